"""From audio to transcripts: long files, batches, timings and warnings around an engine."""
