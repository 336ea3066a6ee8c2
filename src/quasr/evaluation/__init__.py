"""Word and character error rates over a manifest."""
