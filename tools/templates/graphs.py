"""The templates: what ComfyUI's template browser shows of this pack, as data. make.py writes the files.

A template is a few steps, a step columns of nodes. Of a node stands here what differs from its defaults: widgets by value,
links as the name of the node they come from, with the output's name where it is not the first.
"""

from dataclasses import dataclass

from .forms import MUTED, Group, Node, Template

HUB = "https://huggingface.co"
NON_COMMERCIAL = "FLUX.1 dev's licence allows non-commercial use."


@dataclass
class File:
    """What a loader names: directory of ComfyUI's models, address, GB, and the other name the address ends in, if any."""
    name: str
    directory: str
    place: str
    gigabytes: float | None = None
    note: str = ""

    @property
    def url(self):
        return f"{HUB}/{self.place.replace(':', '/resolve/main/', 1)}"

    def as_model(self):
        """For properties.models of a loader: the frontend offers to download what is missing."""
        return {"name": self.name, "url": self.url, "directory": self.directory}

    def as_line(self):
        size = f" ({self.gigabytes:g} GB)" if self.gigabytes else ""
        there = self.place.rpartition("/")[2].rpartition(":")[2]
        rename = "" if there == self.name else f", there called {there}: save it under this name"
        return f"- **{self.directory}** / [{self.name}]({self.url}){size}{rename}{self.note}"


def svdq(model):
    """The 4-bit file of a FLUX.1 model."""
    repository, name = f"nunchaku-tech/nunchaku-flux.1-{model}", f"_r32-flux.1-{model}.safetensors"
    other = f"svdq-fp4{name}"
    return File(f"svdq-int4{name}", "diffusion_models", f"{repository}:svdq-int4{name}", 6.8,
                f", for any GPU.\n  On RTX 50 also [{other}]({HUB}/{repository}/resolve/main/{other}); pick it in *SVDQ "
                "Loader*")


ENCODERS = [File("clip_l.safetensors", "text_encoders", "comfyanonymous/flux_text_encoders:clip_l.safetensors", 0.2),
            File("t5xxl_fp8_e4m3fn.safetensors", "text_encoders",
                 "comfyanonymous/flux_text_encoders:t5xxl_fp8_e4m3fn.safetensors", 4.9)]
VAE = File("ae.safetensors", "vae", "Comfy-Org/Lumina_Image_2.0_Repackaged:split_files/vae/ae.safetensors", 0.3)
DEV, SCHNELL, KREA, KONTEXT, FILL, CANNY, DEPTH = map(svdq, ("dev", "schnell", "krea-dev", "kontext-dev", "fill-dev",
                                                             "canny-dev", "depth-dev"))
DENSE = File("flux1-dev.safetensors", "diffusion_models", "Comfy-Org/flux1-dev:flux1-dev.safetensors", 23.8)
TURBO = File("flux.1-turbo-alpha.safetensors", "loras",
             "alimama-creative/FLUX.1-Turbo-Alpha:diffusion_pytorch_model.safetensors", 0.7)
REALISM = File("realism_lora_comfy_converted.safetensors", "loras",
               "XLabs-AI/flux-lora-collection:realism_lora_comfy_converted.safetensors")
REMOVAL = File("removal_timestep_alpha-2-1740.safetensors", "loras",
               "lrzjason/ObjectRemovalFluxFill:removal_timestep_alpha-2-1740.safetensors", 0.1)
CANNY_LORA = File("flux1-canny-dev-lora.safetensors", "loras",
                  "black-forest-labs/FLUX.1-Canny-dev-lora:flux1-canny-dev-lora.safetensors", 1.2)
DEPTH_LORA = File("flux1-depth-dev-lora.safetensors", "loras",
                  "black-forest-labs/FLUX.1-Depth-dev-lora:flux1-depth-dev-lora.safetensors", 1.2)
UNION = File("flux.1-dev-controlnet-union-pro-2.0.safetensors", "controlnet",
             "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0:diffusion_pytorch_model.safetensors", 4.3)
UPSCALER = File("flux.1-dev-controlnet-upscaler.safetensors", "controlnet",
                "jasperai/Flux.1-dev-Controlnet-Upscaler:diffusion_pytorch_model.safetensors", 3.6)
REDUX = File("flux1-redux-dev.safetensors", "style_models", "black-forest-labs/FLUX.1-Redux-dev:flux1-redux-dev.safetensors",
             0.1)
VISION = File("sigclip_vision_patch14_384.safetensors", "clip_vision",
              "Comfy-Org/sigclip_vision_384:sigclip_vision_patch14_384.safetensors", 0.9)
USO_LORA = File("uso-flux1-dit-lora-v1.safetensors", "loras",
                "Comfy-Org/USO_1.0_Repackaged:split_files/loras/uso-flux1-dit-lora-v1.safetensors")
USO_PROJECTOR = File("uso-flux1-projector-v1.safetensors", "model_patches",
                     "Comfy-Org/USO_1.0_Repackaged:split_files/model_patches/uso-flux1-projector-v1.safetensors")
DEMO_FILE, DEMO_LORA = "svdq-int4_r16-demo.safetensors", "svdq-demo-sticker.safetensors"

LIGHTHOUSE = "a lighthouse on a cliff at dusk, long exposure, the sea like mist, warm light in the windows"
DEMO_PROMPT = "a green moon above a blue ring on a checkered orange background"
PLAIN = "svdq-10-flux-dev-text-to-image"        # a picture from a text, and nothing else
PICTURE = "example.png"                 # every ComfyUI has it in its input folder
FREE_CFG = "Leave **cfg at 1**"
SEED = "- the seed: another picture; `fixed` repeats it\n"
MASK = ("- the picture, and its mask: right-click *Picture*, *Open in MaskEditor*, and paint over what shall be new. The "
        "example has no mask, so nothing of it changes\n")


def node(kind, title=None, mode=0, **values):
    return Node(kind, title, values, mode)


def group(title, *columns):
    return Group(title, columns)


def template(name, title, about, change, groups, files=(), after="", picture=None, app=None):
    """files: of what is downloaded; the note lists them."""
    lines = [f"## {title}\n", f"{about}\n"]
    if files:
        lines += [f"Put {'this file' if len(files) == 1 else 'these files'} below ComfyUI's **models** folder and press **R**. "
                  "Then Run.\n", *(file.as_line() for file in files), ""]
    if after:
        lines += [after, ""]
    return Template(name, title, "\n".join(lines), change, groups, after, {file.name: file for file in files}, app, picture)


# Nodes that most have in common

def model(file):
    return node("SVDQModelLoader", "SVDQ Loader", model_name=file if isinstance(file, str) else file.name)


def encoders():
    return node("DualCLIPLoader", "Load Text Encoders", clip_name1=ENCODERS[0].name, clip_name2=ENCODERS[1].name, type="flux")


def vae():
    return node("VAELoader", "Load VAE", vae_name=VAE.name)


def models(file, **more):
    """The first step: what is loaded."""
    return group("Models", {"model": model(file), **more, "text": encoders(), "vae": vae()})


def lora(title, file, strength=1.0, model="model"):
    return node("LoraLoaderModelOnly", title, model=model, lora_name=file.name, strength_model=strength)


def prompt(text, **values):
    return node("CLIPTextEncode", "Prompt", clip="text", text=text, **values)


def guidance(value=3.5, conditioning="prompt"):
    return node("FluxGuidance", "Guidance", conditioning=conditioning, guidance=value)


def no_negative(conditioning="prompt"):
    return node("ConditioningZeroOut", "No negative prompt", conditioning=conditioning)


def size(width=1024, height=1024, batch=1):
    return node("EmptySD3LatentImage", "Size", width=width, height=height, batch_size=batch)


def picture(title="Picture"):
    return node("LoadImage", title, image=PICTURE)


def scaled(image="picture", megapixels=1.0):
    return node("ImageScaleToTotalPixels", "One megapixel", image=image, upscale_method="lanczos", megapixels=megapixels,
                resolution_steps=16)


def sampler(title="Sampler", **values):
    return node("KSampler", title, **{"model": "model", "positive": "guidance", "negative": "negative",
                                      "latent_image": "size", "seed": 1, "steps": 20, "cfg": 1.0, "sampler_name": "euler",
                                      "scheduler": "simple", **values})


def decode(samples="sampler", title="Decode"):
    return node("VAEDecode", title, samples=samples, vae="vae")


def encode(pixels="scaled", title="Encode"):
    return node("VAEEncode", title, pixels=pixels, vae="vae")


def sampling(**values):
    return group("Sampling", {"sampler": sampler(**values), "decode": decode()})


def saved(name, images="decode"):
    return group("Picture", {"save": node("SaveImage", "Save Image", images=images, filename_prefix=f"svdq-{name}")})


def words(text=LIGHTHOUSE, value=3.5, **more):
    """Prompt and size; value: the guidance, None for a model that has none."""
    second = {"guidance": guidance(value)} if value is not None else {}
    return group("Prompt and size", {"prompt": prompt(text)}, {**second, "negative": no_negative(), "size": size(), **more})


def asked(text, value, **more):
    """A prompt whose picture has the size of another."""
    return group("Prompt", {"prompt": prompt(text), "guidance": guidance(value), "negative": no_negative(), **more})


COMMON = [*ENCODERS, VAE]
APP = ((("prompt", "text"), ("size", "width"), ("size", "height"), ("sampler", "seed")), ("save",))


# Templates

def demo(name, title, tail, change, lora_of_it, slug):
    more = {"lora": node("SVDQLoraLoader", "SVDQ LoRA Loader", model="model", lora_name=DEMO_LORA)} if lora_of_it else {}
    run = f"python3 workflows/run.py {slug + ' ' if lora_of_it else ''}"
    return template(
        name, title,
        "Press **Run**: everything it needs comes with the pack. A FLUX of 6.7 million parameters, trained on drawings of "
        "simple things and quantised to 4 bits, paints what the prompt says, on any GPU or CPU, in seconds.\n\n"
        f"{tail}In a terminal: `{run}--set \"Prompt.text=four pink hearts on a black background\"`",
        "- the prompt: *three green moons on a faded purple background*, *a large dotted orange circle above a white cross on "
        f"a striped blue background*\n- the seed, the steps, cfg (3)\n{change}\n"
        "The help page of **Demo Prompt** lists its words.\n",
        [group("Files", {"model": model(DEMO_FILE), **more, "vae": node("SVDQDemoVAE", "Demo VAE")}),
         group("Prompt and size", {"prompt": node("SVDQDemoPrompt", "Prompt", text=DEMO_PROMPT), "negative": no_negative(),
                                   "size": size(160, 160)}),
         sampling(model="lora" if lora_of_it else "model", positive="prompt", cfg=3.0), saved(slug)],
        after="It shows that the way from file to picture works, not what FLUX.1 can do.",
        picture={"prompt": DEMO_PROMPT}, app=None if lora_of_it else APP)


def text_to_image():
    yield demo("svdq-00-demo", "Does it work here?", "", "", False, "demo")
    yield demo("svdq-01-demo-lora", "A LoRA on 4-bit weights",
               "The LoRA turns things into **stickers**. It goes into the 16-bit branch beside the 4-bit weights; change its "
               "strength and press Run again.\n\n", "- the strength of the LoRA, also beyond 1 or below 0\n", True, "demo-lora")
    yield template(
        PLAIN, "FLUX.1 dev in 4 bits", "A picture from a text.",
        f"- the prompt and the size: 512 to 1536, in steps of 16\n{SEED}- steps: 20 to 30\n"
        f"- guidance: 2 is softer, 5 follows the prompt closer. {FREE_CFG}\n",
        [models(DEV), words(), sampling(), saved("dev")], [DEV, *COMMON],
        f"The node *SVDQ Loader from Hugging Face* downloads the first file by itself. {NON_COMMERCIAL}", app=APP,
        picture={"prompt": "a yellow star above a white cross on a faded blue background"})
    yield template(
        "svdq-11-flux-schnell-text-to-image", "FLUX.1 schnell in 4 bits", "A picture from a text in four steps.",
        f"- the prompt and the size: 512 to 1536, in steps of 16\n{SEED}"
        f"- steps: 1 to 4 is enough. schnell has no guidance; {FREE_CFG.lower()}\n",
        [models(SCHNELL), words(value=None), sampling(positive="prompt", steps=4), saved("schnell")], [SCHNELL, *COMMON],
        "The node *SVDQ Loader from Hugging Face* downloads the first file by itself. FLUX.1 schnell is Apache 2.0.",
        picture={"prompt": "three red hearts on a striped white background"})
    yield template(
        "svdq-12-flux-krea-text-to-image", "FLUX.1 Krea dev in 4 bits",
        "A picture from a text, by the FLUX that was tuned for photographs that do not look like an AI's.",
        f"- the prompt: what it shows, the light, the camera\n- the size: about one megapixel, in steps of 16\n{SEED}"
        f"- guidance 3.5 to 5, steps 28 to 32. {FREE_CFG}\n",
        [models(KREA), words("a photo of an old fisherman mending a net in his doorway, overcast light, 50 mm", 4.5),
         sampling(steps=28), saved("krea")], [KREA, *COMMON], NON_COMMERCIAL,
        picture={"prompt": "a large striped purple circle in the middle on a dotted yellow background"})
    yield template(
        "svdq-13-flux-dev-image-to-image", "A picture from a picture", "FLUX.1 dev paints your picture anew, after a text.",
        "- the picture, and a prompt that says what the new one shows\n- **denoise** of *Sampler*: 0.5 keeps most of the "
        f"picture, 0.9 little more than its colours\n{SEED}",
        [models(DEV),
         group("Picture to start from", {"picture": picture(), "scaled": scaled(), "encode": encode()}),
         asked("a watercolour of a small house in the mountains, loose brush strokes", 3.5),
         sampling(latent_image="encode", denoise=0.75), saved("image-to-image")], [DEV, *COMMON], NON_COMMERCIAL,
        picture={"prompt": "a large red heart in the middle on a white background",
                 "input": "a large blue circle in the middle on a yellow background"})
    yield template(
        "svdq-14-flux-dev-hires-fix", "More pixels than FLUX.1 dev paints well at once",
        "Paints at one megapixel, enlarges the latent 1.5 times and paints details into it. The first picture is shown, the "
        "second saved.",
        f"- the prompt and the first size\n- **scale_by**: 1.5 to 2\n- **denoise** of *Second sampler*: 0.45 adds little, 0.65 "
        f"much. Lower than 0.4 it stays blurred\n{SEED}",
        [models(DEV), words(),
         group("First picture", {"sampler": sampler(), "decode": decode(),
                                 "preview": node("PreviewImage", "First picture", images="decode")}),
         group("Second picture", {"larger": node("LatentUpscaleBy", "Enlarge", samples="sampler", upscale_method="bislerp",
                                                 scale_by=1.5),
                                  "second": sampler("Second sampler", latent_image="larger", denoise=0.55),
                                  "decode2": decode("second", "Decode second")}),
         saved("hires-fix", "decode2")], [DEV, *COMMON], NON_COMMERCIAL,
        picture={"prompt": "a large green star in the middle on a dotted pink background", "denoise": 0.4})


def kontext_nodes(conditioning):
    return {"guidance": guidance(2.5, conditioning), "negative": no_negative()}


def kontext():
    start = group("Picture to edit", {"picture": picture(),
                                      "scaled": node("FluxKontextImageScale", "A size Kontext knows", image="picture"),
                                      "encode": encode()})
    reference = {"reference": node("ReferenceLatent", "Reference", conditioning="prompt", latent="encode")}
    change = ("- the picture\n- the prompt: say what changes and what stays, *make it night, keep the house as it is*\n"
              f"{SEED}- guidance: 2 to 4. {FREE_CFG}\n")
    yield template(
        "svdq-20-kontext-edit", "Edit a picture with FLUX.1 Kontext in 4 bits", "Say what shall be different.", change,
        [models(KONTEXT), start,
         group("Prompt", {"prompt": prompt("make it a winter evening, with snow on everything. Keep the rest as it is"),
                          **reference, **kontext_nodes("reference")}),
         sampling(latent_image="encode"), saved("kontext")], [KONTEXT, *COMMON], NON_COMMERCIAL,
        app=((("picture", "image"), ("prompt", "text"), ("sampler", "seed")), ("save",)),
        picture={"prompt": "a large red heart in the middle on a striped blue background",
                 "input": "a large red heart in the middle on a yellow background", "pair": True})
    yield template(
        "svdq-21-kontext-multiple-images", "Several pictures with FLUX.1 Kontext in 4 bits",
        "Two pictures go into one: each is a reference of its own.",
        "- both pictures\n- the prompt: *the first image*, *the second image*, or what is in them\n- the size of the result\n"
        f"{SEED}- a third picture: one more *Load Image*, scale, encode and *Reference* in the chain\n",
        [models(KONTEXT),
         group("Pictures", {"first": picture("First picture"),
                            "scaled": node("FluxKontextImageScale", "Scale first", image="first"),
                            "encode": encode("scaled", "Encode first")},
               {"other": picture("Second picture"),
                "scaled2": node("FluxKontextImageScale", "Scale second", image="other"),
                "encode2": encode("scaled2", "Encode second")}),
         group("Prompt and size",
               {"prompt": prompt("put what is in the first image beside what is in the second, in one room"),
                "reference": node("ReferenceLatent", "First reference", conditioning="prompt", latent="encode"),
                "reference2": node("ReferenceLatent", "Second reference", conditioning="reference", latent="encode2")},
               {"method": node("FluxKontextMultiReferenceLatentMethod", "How they are told apart", conditioning="reference2",
                               reference_latents_method="index"), **kontext_nodes("method"), "size": size()}),
         sampling(), saved("kontext-multiple")], [KONTEXT, *COMMON], NON_COMMERCIAL,
        picture={"prompt": "a red heart left of a blue star on a white background",
                 "input": "a red heart left of a blue star on a yellow background", "pair": True})
    yield template(
        "svdq-22-kontext-turbo-lora", "FLUX.1 Kontext in eight steps", "The Turbo LoRA, loaded by ComfyUI's own node, makes "
        "eight steps enough.", change + "- the LoRA's strength: 1. Without it, 20 steps\n",
        [models(KONTEXT, lora=lora("Turbo LoRA", TURBO)), start,
         group("Prompt", {"prompt": prompt("turn it into a pencil drawing on rough paper"), **reference,
                          **kontext_nodes("reference")}),
         sampling(model="lora", latent_image="encode", steps=8), saved("kontext-turbo")], [KONTEXT, TURBO, *COMMON],
        NON_COMMERCIAL, picture={"prompt": "a large blue star in the middle on a white background",
                                 "input": "a large red star in the middle on a white background", "pair": True})


def inpainting(pixels="picture", mask="picture.MASK"):
    return {"inpaint": node("InpaintModelConditioning", "Picture and mask", positive="guidance", negative="negative", vae="vae",
                            pixels=pixels, mask=mask)}


def filled(name, file_of_more, words_, pictures, change, title, about, files, thumbnail, pixels="picture",
           mask="picture.MASK"):
    last = "lora" if file_of_more else "model"
    return template(
        name, title, about, change,
        [models(FILL, **file_of_more), pictures, asked(words_, 30.0, **inpainting(pixels, mask)),
         group("Sampling", {"differential": node("DifferentialDiffusion", "Soft edges of the mask", model=last),
                            "sampler": sampler(model="differential", positive="inpaint.positive", negative="inpaint.negative",
                                               latent_image="inpaint.latent", scheduler="normal"), "decode": decode()}),
         saved(name.partition("-fill-")[2])], files, NON_COMMERCIAL, picture=thumbnail)


def fill():
    start = group("Picture", {"picture": picture()})
    yield filled("svdq-30-fill-inpaint", {}, "a hot-air balloon with red and white stripes", start,
                 f"{MASK}- the prompt: what is in the masked place\n{SEED}- guidance: about 30. {FREE_CFG}\n",
                 "Inpaint with FLUX.1 Fill in 4 bits", "Paints what the prompt says into the mask of your picture.",
                 [FILL, *COMMON], {"prompt": "a green star left of a red circle on a yellow background",
                                   "input": "a blue square left of a red circle on a yellow background",
                                   "hole": (0.0, 0.1, 0.5, 0.9)})
    yield filled("svdq-31-fill-outpaint", {}, "a wide mountain valley in the morning, mist between the trees",
                 group("Picture", {"picture": picture(), "pad": node(
                     "ImagePadForOutpaint", "Room around it", image="picture", left=256, right=256, feathering=24)}),
                 "- the picture\n- left, top, right, bottom: how many pixels are added\n"
                 f"- the prompt: what the whole picture shows\n{SEED}- guidance: about 30. {FREE_CFG}\n",
                 "Outpaint with FLUX.1 Fill in 4 bits", "Paints what lies beyond the edges of your picture.", [FILL, *COMMON],
                 {"prompt": "a red heart left of a red ring on a striped blue background",
                  "input": "a small red heart in the middle on a striped blue background", "outpaint": True},
                 "pad", "pad.MASK")
    yield filled("svdq-32-fill-remove-object", {"lora": lora("Removal LoRA", REMOVAL)},
                 "the empty place, its background going on", start,
                 f"{MASK}- the mask should reach a little beyond the thing and its shadow\n{SEED}"
                 "- the LoRA's strength: 0.8 to 1.2\n",
                 "Remove a thing with FLUX.1 Fill in 4 bits", "A LoRA for Fill that takes out what the mask covers.",
                 [FILL, REMOVAL, *COMMON], {"prompt": "a small red circle at the right on a yellow background",
                                            "input": "a blue square left of a red circle on a yellow background",
                                            "hole": (0.0, 0.1, 0.5, 0.9)})


def controlled(name, title, about, file, value, words_, prepared, thumbnail, change, extra=None, files=()):
    """A model, or dev with a LoRA, that follows a picture of edges or of depth."""
    last = next(reversed(prepared))
    return template(
        name, title, about, change,
        [models(file, **(extra or {})), group("Picture to follow", {"picture": picture(), **prepared}),
         asked(words_, value, control=node("InstructPixToPixConditioning", "Picture beside the noise", positive="guidance",
                                           negative="negative", vae="vae", pixels=last)),
         sampling(model="lora" if extra else "model", positive="control.positive", negative="control.negative",
                  latent_image="control.latent", scheduler="normal"), saved(name.split("-", 2)[2])],
        [file, *files, *COMMON], NON_COMMERCIAL, picture=thumbnail)


def edges(image="scaled"):
    return {"scaled": scaled(), "edges": node("Canny", "Edges", image=image, low_threshold=0.15, high_threshold=0.3)}


def control():
    bird = "a kingfisher on a mossy branch, sharp feathers, soft green background"
    room = "a reading room with tall windows, wooden shelves and a green carpet"
    edge_change = ("- the picture: its edges are kept\n- the thresholds of *Edges*: lower ones find more\n"
                   f"- the prompt: what stands within the edges\n{SEED}- guidance: about 30. {FREE_CFG}\n")
    depth_change = ("- the picture: a **depth picture**, near is white. Graphs that make one from a photo are among ComfyUI's "
                    "own templates and blueprints (*Depth*); put their last node in place of *Load Image*\n"
                    f"- the prompt\n{SEED}- guidance: about 10. {FREE_CFG}\n")
    strength = "- the LoRA's strength: lower follows the picture less\n"
    drawn = {"prompt": "a purple moon above a red cross on a white background"}
    depth = {"prompt": "a green circle left of a pink square on a blue background"}
    yield controlled("svdq-40-canny", "FLUX.1 Canny in 4 bits", "A picture with the edges of yours.", CANNY, 30.0, bird,
                     edges(), {**drawn, "control": "edges"}, edge_change)
    yield controlled("svdq-41-depth", "FLUX.1 Depth in 4 bits", "A picture with the depth of yours.", DEPTH, 10.0, room,
                     {"scaled": scaled()}, {**depth, "control": "depth"}, depth_change)
    yield controlled("svdq-42-canny-lora", "Edges as a LoRA of FLUX.1 dev",
                     "The same as FLUX.1 Canny, from the dev file and a LoRA: one big file less on the disk.", DEV, 30.0, bird,
                     edges(), {**drawn, "control": "edges"}, edge_change + strength,
                     {"lora": lora("Canny LoRA", CANNY_LORA)}, [CANNY_LORA])
    yield controlled("svdq-43-depth-lora", "Depth as a LoRA of FLUX.1 dev",
                     "The same as FLUX.1 Depth, from the dev file and a LoRA: one big file less on the disk.", DEV, 10.0, room,
                     {"scaled": scaled()}, {**depth, "control": "depth"}, depth_change + strength,
                     {"lora": lora("Depth LoRA", DEPTH_LORA)}, [DEPTH_LORA])
    net = {"net": node("ControlNetLoader", "Load ControlNet", control_net_name=UNION.name)}
    yield template(
        "svdq-44-controlnet-union", "A ControlNet on FLUX.1 dev in 4 bits",
        "ControlNet Union Pro 2.0 follows edges, soft edges, depth, poses or a grey picture; here, edges.",
        "- the picture; for another kind of control, another node in place of *Edges*\n"
        "- **strength** 0.7 and **end_percent** 0.8: lower follows the picture less\n"
        f"- *Kind of control* is for Union Pro 1; Pro 2.0 finds out by itself (*auto*)\n{SEED}",
        [models(DEV, **net), group("Picture to follow", {"picture": picture(), **edges(), "latent": encode("scaled", "Size")}),
         asked(bird, 3.5, kind=node("SetUnionControlNetType", "Kind of control", control_net="net", type="auto")),
         group("Control", {"control": node("ControlNetApplyAdvanced", "Apply ControlNet", positive="guidance",
                                           negative="negative", control_net="kind", image="edges", vae="vae", strength=0.7,
                                           end_percent=0.8)}),
         sampling(positive="control.positive", negative="control.negative", latent_image="latent", steps=28),
         saved("controlnet-union")], [DEV, UNION, *COMMON], NON_COMMERCIAL, picture={**drawn, "control": "edges"})
    yield template(
        "svdq-45-controlnet-upscaler", "Enlarge a picture with FLUX.1 dev in 4 bits",
        "A ControlNet that was trained on small, blurred pictures paints the details of large ones.",
        "- the picture: small. At four times 512 pixels, the result has 2048, and takes eight times as long as 1024\n"
        "- **scale_by**: 2 to 4\n- the prompt: empty, or what the picture shows\n"
        f"- **strength** 0.6: higher stays closer to the picture\n{SEED}",
        [models(DEV, net=node("ControlNetLoader", "Load ControlNet", control_net_name=UPSCALER.name)),
         group("Small picture", {"picture": picture(),
                                 "larger": node("ImageScaleBy", "Enlarge", image="picture", upscale_method="lanczos",
                                                scale_by=2.0), "latent": encode("larger", "Size")}),
         asked("", 3.5),
         group("Control", {"control": node("ControlNetApplyAdvanced", "Apply ControlNet", positive="guidance",
                                           negative="negative", control_net="net", image="larger", vae="vae", strength=0.6)}),
         sampling(positive="control.positive", negative="control.negative", latent_image="latent", steps=28),
         saved("controlnet-upscaler")], [DEV, UPSCALER, *COMMON], NON_COMMERCIAL, picture={**drawn, "control": "small"})


def references():
    yield template(
        "svdq-50-redux-variations", "Variations of a picture with Redux on FLUX.1 dev in 4 bits",
        "Redux turns a picture into words for FLUX: pictures like it, not copies.",
        "- the picture; **crop** of *Look at it*: *none* sees all of a wide one\n"
        f"- the prompt: mostly overruled by the picture. Lower **strength** of *Apply Redux* to hear it\n{SEED}",
        [models(DEV, vision=node("CLIPVisionLoader", "Load CLIP Vision", clip_name=VISION.name),
                redux=node("StyleModelLoader", "Load Redux", style_model_name=REDUX.name)),
         group("Picture to vary", {"picture": picture(), "look": node("CLIPVisionEncode", "Look at it", clip_vision="vision",
                                                                      image="picture")}),
         words("", 3.5, style=node("StyleModelApply", "Apply Redux", conditioning="guidance", style_model="redux",
                                   clip_vision_output="look")),
         sampling(positive="style"), saved("redux")], [DEV, REDUX, VISION, *COMMON], NON_COMMERCIAL,
        picture={"prompt": "a striped orange ring above a purple star on a black background", "control": "reference"})
    yield template(
        "svdq-51-uso-reference", "The style of a picture with USO on FLUX.1 dev in 4 bits",
        "USO's LoRA and its projector, which ComfyUI hooks into the model, bring the style of a picture into what the prompt "
        "says.", f"- the picture whose style you want\n- the prompt: what it shows\n- the LoRA's strength\n{SEED}",
        [models(DEV, lora=lora("USO LoRA", USO_LORA),
                vision=node("CLIPVisionLoader", "Load CLIP Vision", clip_name=VISION.name),
                projector=node("ModelPatchLoader", "Load USO Projector", name=USO_PROJECTOR.name)),
         group("Picture of the style", {"picture": picture(),
                                        "look": node("CLIPVisionEncode", "Look at it", clip_vision="vision", image="picture"),
                                        "style": node("USOStyleReference", "Style", model="lora", model_patch="projector",
                                                      clip_vision_output="look")}),
         words("a harbour town in the evening, boats at the quay"), sampling(model="style"), saved("uso")],
        [DEV, USO_LORA, USO_PROJECTOR, VISION, *COMMON], NON_COMMERCIAL,
        picture={"prompt": "four dotted blue squares on a striped pink background", "control": "reference"})


def tools():
    yield template(
        "svdq-60-several-loras", "Several LoRAs on FLUX.1 dev in 4 bits",
        "ComfyUI's own LoRA nodes, one behind the other: eight steps from the one, another look from the other. *SVDQ LoRA "
        "Stack* does the same in one node and reports what became of each.",
        f"- the LoRAs, their order and strengths\n- steps: 8 with the Turbo LoRA, 20 to 30 without\n- the prompt\n{SEED}",
        [models(DEV, lora=lora("Turbo LoRA", TURBO), lora2=lora("Another LoRA", REALISM, 0.8, "lora")),
         words("a portrait of a violin maker in her workshop, morning light, wood shavings on the bench"),
         sampling(model="lora2", steps=8), saved("loras")], [DEV, TURBO, REALISM, *COMMON], NON_COMMERCIAL,
        picture={"prompt": "a blue star left of a red heart on a faded green background", "lora": 0.5})
    yield template(
        "svdq-61-faster-with-a-cache", "Fewer steps computed: a cache on FLUX.1 dev in 4 bits",
        "*EasyCache* passes over steps that would change little. It is ComfyUI's own; *LazyCache*, which fits in the same "
        "place, is simpler and cares less for quality.",
        "- **reuse_threshold**: 0.1 passes over few steps, 0.3 over many, and the picture changes more\n"
        f"- right-click *EasyCache*, *Bypass*, to see the same picture without it\n"
        f"- steps: the more, the more it saves\n{SEED}",
        [group("Models", {"model": model(DEV), "cache": node("EasyCache", "EasyCache", model="model"), "text": encoders(),
                          "vae": vae()}), words(), sampling(model="cache", steps=28), saved("cache")], [DEV, *COMMON],
        NON_COMMERCIAL, picture={"prompt": "a red ring above a green circle on a dotted white background"})
    yield template(
        "svdq-62-no-text-encoder-in-memory", "Prompts from the disk",
        "The first run encodes the prompt, saves it in output/conditioning, and paints. After that neither T5 nor CLIP is "
        "needed: press **R**, choose the file in *Load Conditioning*, unmute that node (**Ctrl+M**), draw its output to "
        "*Guidance* and *No negative prompt*, and mute step 2.",
        f"- the prompt, while the encoders are there\n- **filename_prefix**: the file's name\n{SEED}"
        "- files made on a big machine run on a small one: put them into ComfyUI's **input** folder\n",
        [group("Models", {"model": model(DEV), "vae": vae()}),
         group("Encode and save, once", {"text": encoders(), "prompt": prompt(LIGHTHOUSE),
                                         "keep": node("SVDQSaveConditioning", "Save Conditioning", conditioning="prompt",
                                                      filename_prefix="lighthouse")}),
         group("Prompt and size", {"load": node("SVDQLoadConditioning", "Load Conditioning", MUTED,
                                                file="conditioning/lighthouse_00001_.safetensors [output]"),
                                   "guidance": guidance(conditioning="keep"), "negative": no_negative("keep"),
                                   "size": size()}),
         sampling(), saved("saved-prompt")], [DEV, *COMMON], NON_COMMERCIAL,
        picture={"prompt": "a small yellow moon at the top on a black background"})
    yield template(
        "svdq-70-download-and-run", "Download and run",
        "*SVDQ Loader from Hugging Face* fetches the 4-bit file when it runs for the first time: 6.8 GB, once, into "
        "models/diffusion_models. With no file name it takes the one for your GPU: fp4 on RTX 50, else int4.",
        "- **repo_id**: nunchaku-tech/nunchaku-flux.1-schnell, -krea-dev, or another of their FLUX.1 repositories\n"
        f"- the prompt and the size\n{SEED}- guidance: 2 is softer, 5 follows the prompt closer. {FREE_CFG}\n",
        [group("Models", {"model": node("SVDQHubLoader", "SVDQ Loader from Hugging Face"), "text": encoders(),
                          "vae": vae()}), words(), sampling(), saved("download")], COMMON, NON_COMMERCIAL,
        picture={"prompt": "a large orange star in the middle on a purple background"})


def quantising():
    dense = {"dense": node("UNETLoader", "Load 16-bit FLUX", unet_name=DENSE.name)}
    made = {"quantize": node("SVDQQuantize", "Quantize to SVDQ", model="dense", filename="svdq-{precision}_r{rank}-mine")}
    result = group("What became of it", {"report": node("PreviewAny", "Report", source="quantize.report"),
                                         "plot": node("PreviewImage", "Layers", images="quantize.plot")})
    yield template(
        "svdq-80-quantize-your-model", "Make a 4-bit file of your own FLUX.1",
        "*Quantize to SVDQ* writes the MODEL as it stands in the graph into models/diffusion_models. LoRA nodes between loader "
        "and quantiser are baked in. Stopped, it goes on where it was when run again.",
        "- the file: any FLUX.1 transformer in bf16, fp16 or fp8\n- **precision**: int4 for every GPU, nvfp4 for RTX 50\n"
        "- **rank**: 32 as published; more is closer, larger and slower\n"
        "- **calibration**: the template *calibrate and quantize* makes a file for it; without one the result is a draft\n",
        [group("Model", dense), group("Quantise", made), result], [DENSE], NON_COMMERCIAL,
        picture={"quantise": True})
    yield template(
        "svdq-81-calibrate-and-quantize", "Make a 4-bit file, measured on your prompts",
        "**First** run some ten different prompts: *SVDQ Capture Calibration* adds what the layers see to "
        "models/svdq_calibration. **Then** press **R**, unmute step 5 (**Ctrl+M**), choose the file in *calibration*, and run.",
        "- the prompts: like those you will use; seeds, sizes\n- **filename** of *Capture*: another one begins anew\n"
        "- **precision** and **rank** of *Quantize to SVDQ*\n",
        [group("Models", {**dense, "text": encoders(), "vae": vae()}),
         group("Watch", {"watch": node("SVDQCaptureCalibration", "Capture", model="dense", filename="mine")}),
         words(), group("Sampling", {"sampler": sampler(model="watch"), "decode": decode(),
                                     "save": node("SaveImage", "Save Image", images="decode",
                                                  filename_prefix="svdq-calibration")}),
         group("Quantise, afterwards", {"quantize": node("SVDQQuantize", "Quantize to SVDQ", MUTED, model="dense",
                                                         filename="svdq-{precision}_r{rank}-mine"),
                                        "report": node("PreviewAny", "Report", MUTED, source="quantize.report"),
                                        "plot": node("PreviewImage", "Layers", MUTED, images="quantize.plot")})],
        [DENSE, *COMMON], NON_COMMERCIAL,
        picture={"prompt": "two red hearts on a blue background"})
    yield template(
        "svdq-82-compare", "How far from the 16-bit model?",
        "Both models paint the same prompt from the same seeds; *SVDQ Compare* measures PSNR, SSIM, where it is installed "
        "LPIPS, and draws a sheet: 16 bits, 4 bits, eight times the difference.",
        "- the files: yours and its 16-bit original\n- the prompt, the size and the batch: four pictures say more than one\n"
        "- both samplers must be the same: seed, steps, scheduler\n",
        [group("Models", {"model": model(DEV), **dense, "text": encoders(), "vae": vae()}),
         group("Prompt and size", {"prompt": prompt(LIGHTHOUSE)},
               {"guidance": guidance(), "negative": no_negative(), "size": size(batch=4)}),
         group("16 bits", {"sampler": sampler("16-bit sampler", model="dense"), "decode": decode(title="Decode 16-bit")}),
         group("4 bits", {"sampler2": sampler("4-bit sampler"), "decode2": decode("sampler2", "Decode 4-bit")}),
         group("Comparison", {"compare": node("SVDQCompare", "SVDQ Compare", reference="decode", quantised="decode2",
                                              reference_latent="sampler", quantised_latent="sampler2"),
                              "report": node("PreviewAny", "Report", source="compare.report"),
                              "save": node("SaveImage", "Save Image", images="compare.sheet",
                                           filename_prefix="svdq-compare")})], [DEV, DENSE, *COMMON], NON_COMMERCIAL,
        picture={"prompt": DEMO_PROMPT})
    yield template(
        "svdq-90-is-it-fast-here", "What this machine makes of a file",
        "Press **Run**: nothing to download. *SVDQ Doctor* says which kernels serve which files on this machine, and why no "
        "faster ones. *SVDQ Info* reads a file without loading it: which model, precision, rank, and what is wrong with it.",
        "- the file of *SVDQ Info*: any in models/diffusion_models\n",
        [group("Machine", {"doctor": node("SVDQDoctor", "SVDQ Doctor")}),
         group("File", {"info": node("SVDQInfo", "SVDQ Info", model_name=DEMO_FILE)})], [], picture={"info": True})


TEMPLATES = [*text_to_image(), *kontext(), *fill(), *control(), *references(), *tools(), *quantising()]
# (template, name, category, what it does, pictures that come in, widgets on the node, what comes out)
BLUEPRINTS = [
    (PLAIN, "Text to Image (FLUX.1 dev SVDQ)", "Image generation and editing/Text to image",
     "A picture from a text, by FLUX.1 dev in 4 bits.", {},
     {"prompt": "prompt.text", "width": "size.width", "height": "size.height", "seed": "sampler.seed",
      "model": "model.model_name", "clip_l": "text.clip_name1", "t5": "text.clip_name2", "vae": "vae.vae_name"},
     {"IMAGE": "decode.IMAGE"}),
    ("svdq-20-kontext-edit", "Image Edit (FLUX.1 Kontext SVDQ)", "Image generation and editing/Edit image",
     "Changes a picture as a text says, by FLUX.1 Kontext in 4 bits.", {"image": "scaled.image"},
     {"prompt": "prompt.text", "seed": "sampler.seed", "model": "model.model_name", "clip_l": "text.clip_name1",
      "t5": "text.clip_name2", "vae": "vae.vae_name"}, {"IMAGE": "decode.IMAGE"}),
    ("svdq-30-fill-inpaint", "Image Inpainting (FLUX.1 Fill SVDQ)", "Image generation and editing/Inpaint image",
     "Paints what a text says into the mask of a picture, by FLUX.1 Fill in 4 bits.",
     {"image": "inpaint.pixels", "mask": "inpaint.mask"},
     {"prompt": "prompt.text", "seed": "sampler.seed", "model": "model.model_name", "clip_l": "text.clip_name1",
      "t5": "text.clip_name2", "vae": "vae.vae_name"}, {"IMAGE": "decode.IMAGE"})]
