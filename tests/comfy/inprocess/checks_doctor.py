"""SVDQ Doctor inside ComfyUI: its text is on the node and in its output, and nothing is taken from a cache."""

from types import SimpleNamespace

from svdq_pack.svdq.kernels import build
from svdq_pack.nodes import prompt_server
from svdq_pack.nodes.doctor import SVDQDoctor
from svdq_pack.svdq import doctor


def test_report(monkeypatch):
    said = []
    describe = doctor.describe

    def compiling():
        build._announce_compiling("w4a4", "sm_86", "nvcc", True)
        return describe()

    monkeypatch.setattr(doctor, "describe", compiling)
    monkeypatch.setattr(prompt_server, "running", lambda: SimpleNamespace(send_progress_text=lambda *sent: said.append(sent)))
    monkeypatch.setattr(SVDQDoctor, "hidden", SimpleNamespace(unique_id="7"))
    output = SVDQDoctor.execute()
    text, = output.args
    assert output.ui == {"text": (text,)} and "\nself-test: all " in text
    assert any(f"\nINT4 files: {how}" in text for how in ("fused kernels, 4-bit weights, 8-bit activations\n", "weight-only, "))
    assert [what for what, _ in said] == ["building kernels if need be, and testing them",
                                          "compiling w4a4 for sm_86 with nvcc, once; this may take a minute",
                                          text.replace("\n", "  \n")]
    assert SVDQDoctor.fingerprint_inputs() != SVDQDoctor.fingerprint_inputs()
