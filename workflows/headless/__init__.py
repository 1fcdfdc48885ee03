"""A ComfyUI without a browser: find or make one (environment), start it (process), talk to it (client)."""
