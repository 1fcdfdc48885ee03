"""A ComfyUI without a browser: find or make one (environment, maker), start it (process), talk to it (client)."""
