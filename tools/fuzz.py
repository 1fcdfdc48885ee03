#!/usr/bin/env python3
"""100,000 hostile inputs, seeded, and what became of them.

    python3 tools/fuzz.py                           all classes, side by side on two cores: about 25 minutes
    python3 tools/fuzz.py --cases 20000             fewer
    python3 tools/fuzz.py --class lora --cases 500  of one class
    python3 tools/fuzz.py --class lora --seed 1234  one case alone, with the whole traceback

Runs in the tests' environment, which it makes if needed (tests/run.py). Prints a table, and each distinct fault once with a
line that shows it again. Exit code 0: no faults, 1: some, 2: not used so, 3: no environment.
"""

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GROWTH = 50             # MB that a class may grow by
COLUMNS = "{:<14}{:>8}{:>14}{:>9}{:>9}{:>8}{:>11}{:>11}"


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, help="default: 100000, with --class 5000, with --seed 1")
    parser.add_argument("--class", dest="only", metavar="NAME", help="one class of input alone")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="number of the first case; default: 0")
    parser.add_argument("--jobs", type=int, default=2, help="classes side by side; default: 2")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT / "workflows"))
    from headless import environment
    try:
        python, comfy, *_ = environment.make(ROOT / "tests" / "requirements.txt")
    except environment.SetupError as error:
        print(f"fuzz.py: {error}", file=sys.stderr)
        return 3
    worker = Worker(comfy, python)
    shares = worker.ask({})
    if options.only and options.only not in shares:
        parser.error(f"--class is one of {', '.join(shares)}")
    if options.only and "--seed" in arguments and options.cases is None:
        return worker.ask({"name": options.only, "first": options.seed})["faults"]
    results = []
    for facts in side_by_side(counts(shares, options), options, worker):
        results.append(facts)
        print(f"{facts['name']}: {facts['cases']} cases in {facts['seconds']} s, {facts['faults']} faults", file=sys.stderr,
              flush=True)
    print(table(results))
    return 1 if any(facts["faults"] or facts["grown"] > GROWTH << 20 for facts in results) else 0


def counts(shares, options):
    """{class: cases}"""
    if options.only:
        return {options.only: options.cases or 5000}
    cases = 100_000 if options.cases is None else options.cases
    least = cases // 20
    spare = cases - least * len(shares)
    return {name: least + round(spare * (share - 1) / max(1, sum(shares.values()) - len(shares)))
            for name, share in shares.items()}


def side_by_side(counts, options, worker):
    """The facts of every class, as they come."""
    todo, done = queue.Queue(), queue.Queue()
    for name in sorted(counts, key=counts.get, reverse=True):
        todo.put(name)

    def work(worker):
        try:
            while True:
                name = todo.get_nowait()
                done.put(worker.ask({"name": name, "first": options.seed, "cases": counts[name]}))
        except queue.Empty:
            worker.end()
        except BaseException as error:          # for whoever waits
            done.put(error)

    for i in range(min(options.jobs, len(counts))):
        threading.Thread(target=work, args=(worker if i == 0 else worker.another(),), daemon=True).start()
    for _ in counts:
        facts = done.get()
        if isinstance(facts, BaseException):
            raise facts
        yield facts


class Worker:
    """A process with ComfyUI in it that runs classes one after the other."""

    def __init__(self, comfy, python=sys.executable, seconds=5):
        """seconds: that a case may take."""
        self.comfy, self.python, self.seconds = comfy, python, seconds
        self.process = subprocess.Popen(
            [str(python), str(Path(__file__).resolve()), "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"SVDQ_COMFYUI": str(comfy), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                              "OPENBLAS_NUM_THREADS": "1", "SVDQ_FUZZ_SECONDS": str(seconds),
                              # Large blocks that are free go back to the system: what has grown is in use
                              "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"})

    def another(self):
        return Worker(self.comfy, self.python, self.seconds)

    def ask(self, question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker ended with code {self.process.wait()}")
        return json.loads(answer)

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def table(results):
    lines = [COLUMNS.format("class", "cases", "structural %", "loaded", "refused", "faults", "slowest s", "growth MB")]
    for facts in sorted(results, key=lambda facts: facts["name"]):
        lines.append(COLUMNS.format(facts["name"], facts["cases"], f"{100 * facts['structural'] / facts['cases']:.0f}",
                                    facts["loaded"], facts["refused"], facts["faults"], f"{facts['slowest'] / 1e6:.1f}",
                                    f"{facts['grown'] / 1e6:.0f}"))
    total = {field: sum(facts[field] for facts in results)
             for field in ("cases", "structural", "loaded", "refused", "faults", "slowest", "grown")}
    lines.append(COLUMNS.format("all", total["cases"], f"{100 * total['structural'] / total['cases']:.0f}", total["loaded"],
                                total["refused"], total["faults"], "", ""))
    for facts in results:
        for fault in facts["found"]:
            lines += [f"\n{fault['count']} x {facts['name']}, {fault['mutation']}: {fault['kind']} in {fault['place']}",
                      f"  {fault['message']}",
                      f"  python3 tools/fuzz.py --class {facts['name']} --seed {fault['seed']}"]
    return "\n".join(lines)


# ---- in the worker

def serve():
    """Answers on the first standard output; what libraries print goes to a log."""
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in (ROOT, ROOT / "tools")]
    pack = sys.modules.setdefault("svdq_pack", types.ModuleType("svdq_pack"))
    pack.__path__ = [str(ROOT)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))        # what classes have started ends, too
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder = Path(tempfile.mkdtemp(prefix="svdq-fuzz-"))
    from svdq_pack.tests.hostile import frame
    try:
        classes = frame.classes()
        for number, line in enumerate(sys.stdin):
            asked = json.loads(line)
            if not asked:
                answer = {name: kind.share for name, kind in classes.items()}
            elif "cases" in asked:
                answer = frame.run(classes[asked["name"]], folder / str(number), asked["first"], asked["cases"])
            else:
                answer = {"faults": frame.show(classes[asked["name"]], folder / str(number), asked["first"])}
            print(json.dumps(answer), file=answers, flush=True)
            shutil.rmtree(folder / str(number), ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == ["--worker"] else main(sys.argv[1:]))
