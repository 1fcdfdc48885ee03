"""What stands in the 16 FLUX graphs that ComfyUI-nunchaku comes with, and what is to become of it.

Facts only: the types and values of its own nodes and of other packs' in a graph, and the stock types of all graphs together.
"""


def dit(path, cache=0):
    return "NunchakuFluxDiTLoader", [path, cache, "nunchaku-fp16", "auto", 0, "bfloat16", "enabled"]


def lora(name, strength):
    return "NunchakuFluxLoraLoader", [name, strength]


def deprecated_encoder(t5, clip):
    return "NunchakuTextEncoderLoader", ["flux", t5, clip, 512, "disable", "none"]


def encoder(first, second):
    return "NunchakuTextEncoderLoaderV2", ["flux.1", first, second, 512]


T5, CLIP_L = "t5xxl_fp16.safetensors", "clip_l.safetensors"
DEPTH = "DepthAnythingPreprocessor", ["depth_anything_vitl14.pth", 1024]
MODEL, LORA, ENCODER = "SVDQModelLoader", "SVDQLoraLoader", "SVDQTextEncoderLoader"
KEEPS_PULID = ["NunchakuPuLIDLoaderV2", "NunchakuFluxPuLIDApplyV2"]
KEEPS_IP_ADAPTER = ["NunchakuIPAdapterLoader", "NunchakuFluxIPAdapterApply"]

# graph -> (its nodes that are not ComfyUI's, their types after replacement)
GRAPHS = {
    "canny-lora": ([dit("svdq-int4-flux.1-dev"), lora("canny.safetensors", 0.85)], [MODEL, LORA]),
    "canny": ([dit("svdq-int4-flux.1-canny-dev")], [MODEL]),
    "depth-lora": ([dit("svdq-int4-flux.1-dev"), lora("depth.safetensors", 0.95), DEPTH], [MODEL, LORA, DEPTH[0]]),
    "depth": ([dit("svdq-int4-flux.1-depth-dev"), DEPTH], [MODEL, DEPTH[0]]),
    "dev-controlnet-union-pro2": ([dit("svdq-fp4-flux.1-dev")], [MODEL]),
    "dev-controlnet-upscaler": ([dit("svdq-int4-flux.1-dev")], [MODEL]),
    "dev-pulid": ([dit("svdq-int4_r32-flux.1-dev.safetensors", 0.09), encoder(CLIP_L, T5),
                   ("NunchakuPuLIDLoaderV2", ["pulid_flux_v0.9.1.safetensors", "EVA02_CLIP_L_336_psz14_s6B.pt", "gpu"]),
                   ("NunchakuFluxPuLIDApplyV2", [1, 0, 1])], [MODEL, ENCODER, *KEEPS_PULID]),
    "dev-qencoder": ([dit("svdq-fp4_r32-flux.1-dev.safetensors"), encoder(CLIP_L, "awq-int4-flux.1-t5xxl.safetensors")],
                     [MODEL, ENCODER]),
    "dev": ([dit("svdq-int4-flux.1-dev"), lora("flux1-turbo.safetensors", 1), lora("diffusers-ghibsky.safetensors", 1),
             deprecated_encoder(T5, CLIP_L)], [MODEL, LORA, LORA, ENCODER]),
    "fill-removalV2": ([dit("svdq-fp4-flux.1-fill-dev"), lora("removalV2.safetensors", 1),
                        ("ImageAndMaskResizeNode", [1280, 720, "nearest-exact", "center", 10])],
                       [MODEL, LORA, "ImageAndMaskResizeNode"]),
    "fill": ([dit("svdq-int4-flux.1-fill-dev"), ("ImageAndMaskResizeNode", [1024, 1024, "nearest-exact", "center", 10])],
             [MODEL, "ImageAndMaskResizeNode"]),
    "ip-adapter": ([dit("svdq-fp4_r32-flux.1-dev.safetensors", 0.1), encoder(T5, CLIP_L), ("NunchakuIPAdapterLoader", []),
                    ("NunchakuFluxIPAdapterApply", [1.15])], [MODEL, ENCODER, *KEEPS_IP_ADAPTER]),
    "kontext-dev-turbo_lora": ([dit("svdq-int4_r32-flux.1-kontext-dev.safetensors"),
                                lora("flux.1-turbo-alpha.safetensors", 1)], [MODEL, LORA]),
    "kontext-dev": ([dit("svdq-int4_r32-flux.1-kontext-dev.safetensors")], [MODEL]),
    "redux-dev": ([dit("svdq-fp4-flux.1-dev")], [MODEL]),
    "schnell": ([dit("svdq-int4-flux.1-schnell"), deprecated_encoder(T5, CLIP_L)], [MODEL, ENCODER])}
RUN_AS_THEY_ARE = 10        # of them, without any other pack

# Of a graph whose nodes or values do not all go over: what the texts about it must name
SAID = {
    "depth-lora": ["comfyui_controlnet_aux", "Load Image"], "depth": ["comfyui_controlnet_aux", "Load Image"],
    "dev-pulid": ["cache_threshold 0.09", "EasyCache", "LazyCache", *KEEPS_PULID, "PuLID pack"],
    "fill": ["ComfyUI-InpaintEasy", "Resize Image/Mask"], "fill-removalV2": ["ComfyUI-InpaintEasy", "Resize Image/Mask"],
    "ip-adapter": ["cache_threshold 0.1", "EasyCache", *KEEPS_IP_ADAPTER, "Redux"]}

# All its nodes, of any model, that it registers
NODES = {
    "NunchakuDepthPreprocessor", "NunchakuFluxDiTLoader", "NunchakuFluxIPAdapterApply", "NunchakuFluxLoraLoader",
    "NunchakuFluxLoraStack", "NunchakuFluxPuLIDApplyV2", "NunchakuIPAdapterLoader", "NunchakuModelMerger",
    "NunchakuPuLIDLoaderV2", "NunchakuPulidApply", "NunchakuPulidLoader", "NunchakuQwenImageDiTLoader",
    "NunchakuTextEncoderLoader", "NunchakuTextEncoderLoaderV2", "NunchakuWheelInstaller"}

STOCK = {
    "BasicGuider", "BasicScheduler", "CLIPTextEncode", "CLIPVisionEncode", "CLIPVisionLoader", "Canny", "ConditioningZeroOut",
    "ControlNetApplyAdvanced", "ControlNetLoader", "DualCLIPLoader", "EmptyLatentImage", "EmptySD3LatentImage", "FluxGuidance",
    "FluxKontextImageScale", "ImageScale", "ImageStitch", "InpaintModelConditioning", "InstructPixToPixConditioning",
    "KSampler", "KSamplerSelect", "LoadImage", "LoadImageOutput", "MarkdownNote", "ModelSamplingFlux", "Note", "PreviewImage",
    "PrimitiveNode", "RandomNoise", "ReferenceLatent", "SamplerCustomAdvanced", "SaveImage", "SetUnionControlNetType",
    "StyleModelApply", "StyleModelLoader", "VAEDecode", "VAEEncode", "VAELoader"}
