"""The command that paints in diffusers: its arguments in any Python, its pictures in the private one with diffusers."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from headless import environment, maker, outputs

PIL = pytest.importorskip("PIL.Image")
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "workflows" / "diffusers_demo.py"
OTHER = ROOT / "tests" / "fixtures" / "format" / "model_int4_flux_schnell_like.safetensors"
MODELS = ROOT / "workflows" / "models"


def command(*arguments, **environ):
    """(exit code, standard output, standard error) of the command, where nothing can be fetched from Hugging Face."""
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=600,
                          env={**{name: value for name, value in os.environ.items() if name not in ("SVDQ_HF", "PYTHONPATH")},
                               "HF_HUB_OFFLINE": "1", **environ})
    return done.returncode, done.stdout, done.stderr


# ---- in any Python ----

@pytest.mark.parametrize("arguments, said", [
    (("--steps", "0"), "--steps: 0: must be 1 to 1000"), (("--seed", "-1"), "--seed: -1: must be 0 to"),
    (("--seed", "x"), "--seed: invalid"), (("--lora", "--lora-file", "x"), "not allowed with"), (("a", "b"), "unrecognized"),
    (("--out", "."), "'.': is a folder. Name a PNG file"), (("--out", __file__ + "/a.png"), "cannot be written")])
def test_exit_2_before_anything_is_made(tmp_path, arguments, said):
    """In a Python without site-packages, so that nothing but the standard library is needed to say it."""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); "
                           "import diffusers_demo; from headless import environment; environment.make_hf = None; "
                           "sys.exit(diffusers_demo.main())", *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_picture_of_the_same_name_stays(tmp_path):
    wanted = tmp_path / "a.png"
    assert outputs.save(wanted, b"one") == wanted == outputs.save(wanted, b"one")
    assert [outputs.save(wanted, data).name for data in (b"two", b"three", b"two")] == ["a-1.png", "a-2.png", "a-1.png"]
    assert wanted.read_bytes() == b"one"


# ---- in the one with diffusers ----

@pytest.fixture(scope="module")
def hf():
    try:
        return environment.make_hf()
    except environment.SetupError as error:
        pytest.skip(f"no Python with diffusers: {str(error).splitlines()[0]}")


@pytest.fixture(scope="module")
def painted(hf, tmp_path_factory):
    """painted(arguments) -> (path, picture), once for each."""
    folder, known = tmp_path_factory.mktemp("pictures"), {}

    def paint(*arguments, **environ):
        key = (arguments, *environ)
        if key not in known:
            out = folder / f"{len(known)}.png"
            code, said, errors = command(*arguments, "--out", out, **environ)
            assert code == 0 and said == f"{out}\n" and "Traceback" not in errors, errors
            known[key] = out, PIL.open(out).convert("RGB")
        return known[key]

    return paint


RING = "a large green ring in the middle on a pink background"


def colours(picture):
    """[(count, mean of the colour)] of the coarse colours of a picture, the most frequent first."""
    small = picture.resize((40, 40)).quantize(6, dither=PIL.Dither.NONE).convert("RGB")
    return sorted(small.getcolors(), reverse=True)


def test_it_paints_what_is_asked(painted, record_property):
    start = time.monotonic()
    _, picture = painted(RING, "--seed", "1")
    record_property("seconds", time.monotonic() - start)
    assert picture.size == (160, 160)
    (_, ground), *rest = colours(picture)
    assert ground[0] > ground[1] + 40 and ground[2] > ground[1] + 20, f"{ground} is not pink"
    greens = sum(count for count, (r, g, b) in rest if g > r + 30 and g > b + 30)
    assert greens > 100, rest


def test_a_seed_is_a_picture(painted, tmp_path):
    path, _ = painted(RING, "--seed", "1")
    out = tmp_path / "again.png"
    assert command(RING, "--seed", "1", "--out", out)[0] == 0
    assert out.read_bytes() == path.read_bytes()
    assert painted(RING, "--seed", "2")[0].read_bytes() != path.read_bytes()


def test_the_lora_makes_stickers(painted):
    """White outlines around what is painted, in the same place."""
    pictures = [painted(RING, "--seed", "1", *lora)[1].tobytes() for lora in ((), ("--lora",))]
    whites = [sum(min(data[i:i + 3]) > 200 for i in range(0, len(data), 3)) for data in pictures]
    assert whites[0] < 50 and whites[1] > 1000, whites
    by_name = "--lora-file", MODELS / "loras" / "svdq-demo-sticker.safetensors"
    assert painted(RING, "--seed", "1", "--lora")[0].read_bytes() == painted(RING, "--seed", "1", *by_name)[0].read_bytes()


def test_the_other_demo_model(painted):
    model = MODELS / "diffusion_models" / "svdq-fp4_r16-demo.safetensors"
    first, second = (colours(painted(RING, "--seed", "1", *more)[1])[0][1] for more in ((), ("--model", model)))
    assert max(abs(a - b) for a, b in zip(first, second)) < 40


def test_the_lowest_diffusers_paints_the_same(hf, painted):
    try:
        folder = maker.lowest_hf()
    except environment.SetupError as error:
        pytest.skip(f"no lowest diffusers: {str(error).splitlines()[0]}")
    (_, newest), (_, lowest) = painted(RING, "--seed", "1"), painted(RING, "--seed", "1", PYTHONPATH=str(folder))
    data = [abs(a - b) for a, b in zip(newest.tobytes(), lowest.tobytes())]
    assert sum(data) / len(data) < 1


@pytest.mark.parametrize("arguments, code, said", [
    (("a red cat on a mat",), 2, "The demo model does not know 'cat', 'mat'. It knows a, above"),
    (("--model", OTHER), 2, "is no FLUX.1 of the usual width"),
    (("--lora-file", OTHER), 2, "this is a whole SVDQ FLUX model"),
    (("--model", "owner/nunchaku-flux.1-dev"), 2, "owner/nunchaku-flux.1-dev (main): ")], ids=str)
def test_one_line_says_why_not(hf, tmp_path, arguments, code, said):
    ended, out, errors = command(*arguments, "--out", tmp_path / "a.png", HF_HOME=str(tmp_path / "hub"))
    last = errors.rstrip("\n").splitlines()[-1]
    assert (ended, out) == (code, "") and last.startswith("diffusers_demo.py: ") and said in last
    assert "Traceback" not in errors and not (tmp_path / "a.png").exists()


def test_a_painter_paints_often(hf, tmp_path):
    """Its interface for other programs: loaded once, the pipeline's own arguments, the same picture for the same seed."""
    script = f"""
import sys; sys.path.insert(0, {str(ROOT / 'workflows')!r})
from headless.painter import Painter
painter = Painter(lora=True, device="cpu")
one, two, three = (painter.paint({RING!r}, seed, steps=2, height=96, width=64) for seed in (1, 1, 2))
print(one.size, one.mode, one.tobytes() == two.tobytes(), one.tobytes() == three.tobytes())
"""
    done = subprocess.run([str(hf), "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=600,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.stdout == "(64, 96) RGB True False\n", done.stderr
