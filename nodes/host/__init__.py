"""How an SVDQ model lives in ComfyUI: its linear layer, its loader, its patcher."""
