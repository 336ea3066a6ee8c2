"""From an id or a folder to a loaded network, and back to disk.

    hub (id -> folder)  ->  shard (safetensors files) + layout (names)  ->  load (network)
                                                                            save (network -> folder)

`hub`, its two clients, `record`, `layout` import no torch.
"""
