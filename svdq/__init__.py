"""The SVDQ checkpoint format and the method behind it. Torch only: no ComfyUI, no GPU needed."""
