"""A few of the cases of tools/fuzz.py, of every class: no faults, and both outcomes occur.

A failure names its cases; `python3 tools/fuzz.py --class NAME --seed N` shows one alone.
"""

import json
import os
from pathlib import Path

import pytest

from svdq_pack.tools.fuzz import GROWTH, Worker, table

# Classes whose cases take long have fewer. fuzz.py runs 100,000.
CASES = {"checkpoint": 250, "legacy": 120, "calibration": 400, "conditioning": 500, "compare": 300, "lora": 300, "lora_pt": 300,
         "work": 100, "names": 250, "numbers": 150, "http": 100}


@pytest.fixture(scope="module")
def worker():
    if not os.environ.get("COMFYUI_DIR"):
        pytest.skip("COMFYUI_DIR is not set; tests/run.py sets it")
    worker = Worker(Path(os.environ["COMFYUI_DIR"]), seconds=60)        # beside other jobs all takes many times as long
    yield worker
    worker.end()


@pytest.mark.parametrize("name", CASES)
def test_fuzz(worker, name, record_property):
    facts = worker.ask({"name": name, "first": 0, "cases": CASES[name]})
    record_property("outcomes", json.dumps({key: value for key, value in facts.items() if key != "found"}))
    print(table([facts]))
    assert not facts["faults"], table([facts])
    assert facts["loaded"] and facts["refused"], "only one outcome: this fuzzes nothing"
    assert facts["structural"] >= 0.75 * facts["cases"] and facts["grown"] < GROWTH << 20


def test_every_class_is_here(worker):
    assert worker.ask({}).keys() == CASES.keys()
