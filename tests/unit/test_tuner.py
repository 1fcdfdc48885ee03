"""The tuner on simulated timings: variants that take as long as they are told to, by a clock that moves only for them."""

import collections
import json
import re
import threading
import types
from dataclasses import replace
from functools import partial

import pytest
import torch

from svdq_pack.svdq.kernels import build, cache, check, epilogues, launch, registry, tuner
from svdq_pack.svdq.kernels.variant import Target
from svdq_pack.svdq.kernels.variants.w4a8_sm90 import FP8Weight
from svdq_pack.svdq.kernels.weights import example
from svdq_pack.tests.kernels.executors import Emulator
from svdq_pack.tests.unit.layers import BF16, make
from svdq_pack.tests.unit.test_doctor import needs_gxx

ADA = Target("cuda", (8, 9), 0)
WEIGHT_ONLY = next(variant for variant in registry.VARIANTS if variant.name == "weight_only")
TOKENS = 256
KINDS_OF = check.kinds_of


class Clock:
    """A Watch whose seconds are those that variants claim."""

    def __init__(self):
        self.seconds, self.runs = 0.0, []

    def now(self):
        return self.seconds

    def times(self, runs):
        taken = []
        for run in (runs[0], *runs):
            before = self.seconds
            run()
            taken.append(self.seconds - before)
        return taken[1:]


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def rival(clock):
    """rival(name, seconds of an MLP of all tokens, spoil, hidden, **fields): a Variant like plain torch that takes so long, by
    half for either layer.

    spoil   (out, how many runs it had of this many tokens) once `product` has written it; hidden: the same for first layers
    """
    def make_one(name, seconds, spoil=None, hidden=None, **fields):
        def product(x, weight, out, bias, accumulate, epilogue):
            WEIGHT_ONLY.run(x, weight.unpack() if "layout" in fields else weight, out, bias, accumulate, epilogue)
            clock.seconds += seconds / 2 * len(x) / TOKENS
            first = isinstance(epilogue, epilogues.Gelu)
            if not first:
                clock.runs.append((name, len(x)))
            change = hidden if first else spoil
            if change is not None:
                change(out, clock.runs.count((name, len(x))))
        return replace(WEIGHT_ONLY, **{
            "name": name, "product": product, "device": ("cuda", (8, 9), (8, 9)), "precisions": ("int4",), "dtypes": (BF16,),
            "preference": 50, "last_resort": False, "weight_only": False, "rivals": "race", "max_rank": None,
            "epilogues": epilogues.ALL, "prepare": lambda x, weight: x} | fields)
    return make_one


@pytest.fixture(autouse=True)
def card(monkeypatch, clock, tmp_path):
    """A GPU that is the CPU, with an empty cache; `card.driver` and `card.binary` can be changed."""
    facts = types.SimpleNamespace(driver="580.1", binary="svdq_race_1.so", folder=tmp_path)
    monkeypatch.setattr(tuner, "SHAPE", (TOKENS, 256, 128, 16))
    monkeypatch.setattr(tuner, "LAPS", 5)
    monkeypatch.setattr(check, "kinds_of", lambda variant: ["int4"])
    monkeypatch.setattr(check, "SMALL", (18, 128, 128, 16))
    monkeypatch.setattr(build, "kernels_for", lambda library, index: None)      # nobody else can serve
    small = check.small
    monkeypatch.setattr(check, "small", lambda variant, device: small(variant, "cpu"))
    monkeypatch.setattr(tuner, "CHECKED_COLUMNS", 128)
    monkeypatch.setattr(tuner, "_timed", lambda rivals, target, wrong: tuner.race(rivals, target, clock, wrong, "cpu"))
    monkeypatch.setattr(tuner, "driver", lambda: facts.driver)
    monkeypatch.setattr(tuner, "_binaries", lambda variant, target: [facts.binary])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(tuner, "_choices", {})
    monkeypatch.setattr(tuner, "_anew", False)
    registry.trusted.cache_clear()
    yield facts
    registry.trusted.cache_clear()


@pytest.fixture
def register(monkeypatch):
    def add(*rivals):
        monkeypatch.setattr(registry, "VARIANTS", tuple(sorted((*rivals, *registry.VARIANTS), key=lambda v: -v.preference)))
    return add


def another_process(monkeypatch):
    monkeypatch.setattr(tuner, "_choices", {})


def chosen(weight=None, **more):
    return registry.plan(example("int4") if weight is None else weight, ADA, BF16, **more).variant.name


# The fastest

@pytest.mark.parametrize("seconds, order", [
    ((0.003, 0.002, 0.001), ("c", "b", "a")), ((0.001, 0.002, 0.003), ("a", "b", "c")),
    ((0.002, 0.003, 0.001), ("c", "a", "b")),
    ((0.001005, 0.001, 0.0015), ("a", "b", "c")),           # as fast, but for noise: the preferred
    ((0.00102, 0.001, 0.0015), ("b", "a", "c"))])
def test_the_fastest_serves(register, rival, seconds, order):
    register(*(rival(name, taken, preference=50 - i) for i, (name, taken) in enumerate(zip("abc", seconds))))
    assert chosen() == order[0] == chosen(repack=True)
    choice, = tuner.choices()
    assert choice.order == order and choice.how == "timed" and not choice.wrong
    assert [choice.us[name] for name in "abc"] == pytest.approx([1e6 * taken for taken in seconds])
    assert str(choice) == ", ".join(f"{name} {choice.us[name]:.0f} us" for name in order) + "; timed"


def test_who_is_asked_for_serves_and_nothing_is_timed(register, rival, clock):
    register(rival("a", 0.002, preference=51), rival("b", 0.001))
    for name in ("a", "b", "weight_only"):
        with registry.using(name):
            assert chosen() == name
    assert chosen(act_bits=16) == "b" and {name for name, tokens in clock.runs if tokens == TOKENS} == {"a", "b"}
    with registry.using("a"):
        assert chosen() == "a"


def test_one_alone_is_not_timed(register, rival, clock):
    register(rival("a", 0.002))
    assert chosen() == "a" and tuner.choices() == [] and not any(tokens == TOKENS for _, tokens in clock.runs)


def test_a_weight_packed_for_one_rival(register, rival):
    """It is served by who reads it, as long as he is right; one in the file's order by whoever reads that."""
    register(rival("packs", 0.001, layout=FP8Weight), rival("reads", 0.002, preference=40),
             rival("packs too", 0.0005, layout=FP8Weight, preference=39))
    weight = make("int4", 128, 128, 16)
    packed = FP8Weight.pack(weight)
    assert chosen(repack=True) == "packs too"
    assert (chosen(packed), chosen(packed, repack=True), chosen(weight)) == ("packs too", "packs too", "reads")
    assert not registry.plan(packed, ADA, BF16).unpack


# The wrong

def at_all_tokens(change, times=99):
    """A spoil that changes runs of all tokens, and leaves those of a self-test alone."""
    def spoil(out, runs):
        if len(out) == TOKENS and runs <= times:
            change(out)
    return spoil


def crash(out):
    raise RuntimeError("too many resources requested for launch")


def feeding(product):
    """`feeds` of a rival whose product takes numbers: GELU of these, changed."""
    def feeds(x, weight, bias, following, tokens):
        h = torch.empty(tokens, weight.shape[0], dtype=x.dtype)
        WEIGHT_ONLY.run(x, weight, h, bias, epilogue=epilogues.Gelu())
        return product(h)
    return feeds


@pytest.mark.parametrize("change, fields, words", [
    (at_all_tokens(torch.Tensor.zero_), dict(feeds=feeding(lambda h: h)), "first layer: linear: "),
    (None, dict(feeds=feeding(lambda h: 1.05 * h)), "second layer: linear: "),
    (None, dict(feeds=feeding(torch.zeros_like)), "second layer: linear: "),
    (None, dict(modulates=lambda jobs: [1.05 * x.of() for x, _ in jobs]), "first layer: linear: "),
    (None, dict(modulates=lambda jobs: [x.of() for x, _ in jobs], feeds=feeding(lambda h: h)), None)])
def test_what_it_fuses_is_compared(rival, change, fields, words):
    """Also the half that no race runs: what feeds may be right where what stores is wrong, and the other way."""
    choice = tuner.choose([rival("fuses", 0.001, hidden=change, **fields), rival("a", 0.002)], ADA)
    assert list(choice.wrong) == ([] if words is None else ["fuses"]) and choice.order[0] == ("fuses" if words is None else "a")
    assert words is None or re.match(words, choice.wrong["fuses"])


@pytest.mark.parametrize("change, words", [
    (lambda out: out[:, :128].mul_(1.05), "second layer: linear: .* columns 0 to 128"),
    (lambda out: out[:, 128:].add_(0.1), "second layer: linear: .* columns 128 to 256"),
    (lambda out: out[-1].zero_(), "linear: "),
    (lambda out: out[7, 3].fill_(torch.nan), "not finite"),
    (crash, "RuntimeError: too many resources"),
    (lambda out: out.add_(0.01 * torch.rand(out.shape)), "two runs on the same data differ")])
def test_a_wrong_one_serves_no_more(register, rival, caplog, monkeypatch, change, words):
    """Wrong at this shape alone, and by far the fastest."""
    register(rival("wrong", 0.0001, at_all_tokens(change), preference=60), rival("a", 0.002), rival("b", 0.001))
    torch.manual_seed(0)
    for how in ("timed", "remembered"):
        assert chosen() == "b"
        choice, = tuner.choices()
        assert (choice.order, choice.how, list(choice.wrong)) == (("b", "a"), how, ["wrong"])
        assert re.search(words, choice.wrong["wrong"]) and "wrong WRONG: " in str(choice)
        assert sum("wrong is wrong on cuda:0" in text for text in caplog.messages) == 1
        caplog.clear()
        another_process(monkeypatch)


def test_what_the_one_before_left_is_not_compared(rival):
    """One that writes nothing."""
    def only_first(x, weight, out, bias, accumulate, epilogue):
        if isinstance(epilogue, epilogues.Gelu):
            WEIGHT_ONLY.run(x, weight, out, bias, accumulate, epilogue)
    choice = tuner.choose([rival("a", 0.002), rival("lazy", 0.001, product=only_first)], ADA)
    assert choice.order == ("a",) and "not finite" in choice.wrong["lazy"]


def test_all_are_wrong(register, rival, card):
    """None of them serves, and nothing is remembered."""
    register(*(rival(name, 0.001, at_all_tokens(torch.Tensor.zero_)) for name in "ab"))
    assert chosen() not in "ab"
    choice, = tuner.choices()
    assert set(choice.wrong) == {"a", "b"} and choice.order == () and "every one is wrong" in choice.why
    assert not any(card.folder.iterdir())


def test_one_that_fails_its_self_test_does_not_run(register, rival, clock):
    register(rival("broken", 0.0001, lambda out, runs: out.zero_(), preference=60), rival("a", 0.002), rival("b", 0.001))
    assert chosen() == "b" and tuner.choices()[0].order == ("b", "a") and ("broken", TOKENS) not in clock.runs


# In two seconds

@pytest.mark.parametrize("seconds", [
    (1e-4, 2e-4, 3e-4), (0.02, 0.03, 0.04), (0.05, 0.05, 0.05), (0.09, 0.06, 5.0), (5.0, 0.001, 0.4), (0.3, 0.2, 0.1),
    (3.0, 3.0, 3.0), (60.0, 0.001, 60.0), (0.1, 0.11, 0.001), (0.45, 0.001, 0.001)])
def test_it_takes_two_seconds_at_most(register, rival, clock, seconds):
    """Also of slow ones: a first run of a few tokens says so, at what it costs."""
    rivals = [rival(name, taken, preference=50 - i) for i, (name, taken) in enumerate(zip("abc", seconds))]
    tuner.FEW, before = 2, tuner.FEW
    try:
        choice = tuner.choose(rivals, ADA)
    finally:
        tuner.FEW = before
    trials = sum(taken * 2 * 2 / TOKENS for taken in seconds)
    assert clock.seconds <= tuner.SECONDS + (trials if max(seconds) > 3 else 0)
    assert choice.order[0] == ("abc"[seconds.index(min(seconds))] if choice.how == "timed" else "a")
    assert choice.how == "timed" or min(seconds) > 0.09 and "s are too short" in choice.why or "too slow" in choice.why
    slow = [name for name, taken in zip("abc", seconds) if taken >= 0.45]
    assert all((name, TOKENS) not in clock.runs for name in slow if choice.how == "timed" and seconds["abc".index(name)] > 0.5)
    assert set(choice.order) == set("abc")


def test_two_laps_decide_nothing(rival, clock):
    choice = tuner.choose([rival("a", 0.15), rival("b", 0.14)], ADA)
    assert clock.runs.count(("b", TOKENS)) >= 3                 # a first run, and two laps
    assert (choice.order, choice.how) == (("a", "b"), "default") and "s are too short to compare" in choice.why


def test_who_falls_behind_runs_no_further_lap(register, rival, clock):
    choice = tuner.choose([rival("a", 0.001), rival("b", 0.004)], ADA)
    assert choice.order == ("a", "b") and choice.slow == {"b": "is 4.0 times as slow"} and choice.us["b"] == pytest.approx(4000)
    assert clock.runs.count(("a", TOKENS)) > tuner.LAPS and clock.runs.count(("b", TOKENS)) <= 3


def test_a_hiccup_decides_nothing(register, rival, clock):
    """Medians of laps in turns: other programs use the GPU, too."""
    def hiccup(out, runs):
        clock.seconds += 0.05 * (runs % 7 == 3)
    assert tuner.choose([rival("a", 0.0012), rival("b", 0.001, hiccup)], ADA).order == ("b", "a")


# Remembered

def retimed(monkeypatch, clock):
    """Whether another process times."""
    another_process(monkeypatch)
    before = len(clock.runs)
    name = chosen()
    choice, = tuner.choices()
    assert (choice.how == "timed") == (len(clock.runs) > before)
    return name, choice.how


def test_it_is_remembered(register, rival, clock, monkeypatch, card):
    register(rival("a", 0.002), rival("b", 0.001))
    assert chosen() == "b"
    first, = tuner.choices()
    file, = card.folder.iterdir()
    assert cache.NAME.fullmatch(file.name) and file.name.startswith("tuned_race_sm_89_") and file.stat().st_mode & 0o077 == 0
    assert retimed(monkeypatch, clock) == ("b", "remembered")
    again, = tuner.choices()
    assert (again.us, again.order) == (first.us, first.order)
    tuner.forget()                                          # as bench does
    assert retimed(monkeypatch, clock) == ("b", "timed")
    monkeypatch.setattr(tuner, "_anew", False)
    assert retimed(monkeypatch, clock) == ("b", "remembered") and list(card.folder.iterdir()) == [file]


@pytest.mark.parametrize("change", ["driver", "binary", "device", "shape", "format", "torch", "rivals"])
def test_it_is_timed_again(register, rival, clock, monkeypatch, card, change):
    """With what it depends on; and the old answer is still there when that comes back."""
    register(rival("a", 0.002), rival("b", 0.001))
    assert chosen() == "b"
    with monkeypatch.context() as patch:
        if change == "device":
            patch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA GeForce RTX 4060")
        elif change == "shape":
            patch.setattr(tuner, "SHAPE", (TOKENS, 128, 128, 16))
        elif change == "format":
            patch.setattr(tuner, "FORMAT", tuner.FORMAT + 1)
        elif change == "torch":
            patch.setattr(torch, "__version__", "9.9")
        elif change == "rivals":
            register(rival("c", 0.003))
        else:
            patch.setattr(card, change, "another")
        assert retimed(patch, clock) == ("b", "timed")
        assert retimed(patch, clock) == ("b", "remembered")
    if change != "rivals":
        assert retimed(monkeypatch, clock) == ("b", "remembered")


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: b"", lambda data: data.replace(b'"b"', b'"a"', 1), lambda data: b"\0" * len(data)])
def test_damaged_bytes(register, rival, clock, monkeypatch, card, damage):
    register(rival("a", 0.002), rival("b", 0.001))
    assert chosen() == "b"
    file, = card.folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert retimed(monkeypatch, clock) == ("b", "timed") and retimed(monkeypatch, clock) == ("b", "remembered")


DAMAGED = ({"order": []}, {"order": ["b"]}, {"order": ["b", "weight_only"]}, {"order": ["b", "b"]}, {"order": 7},
           {"order": [[], []]}, {"us": {"b": -1.0}}, {"us": {"b": "fast"}}, {"us": {}}, {"us": {"b": float("nan")}},
           {"wrong": ["b"]}, {"slow": 3}, {"wrong": {"b": "x"}}, {"rivals": "others"}, {"more": 1})


def test_damaged_facts(register, rival, clock, monkeypatch, card, caplog):
    """Whole, but not what it should be: said once, timed again, whole again."""
    caplog.set_level("INFO")
    register(rival("a", 0.002), rival("b", 0.001))
    assert chosen() == "b"
    file, = card.folder.iterdir()
    facts = json.loads(cache.stored(file))
    texts = [json.dumps(facts | {"choice": facts["choice"] | change}) for change in DAMAGED]
    raced, = tuner.choices()
    monkeypatch.setattr(tuner, "race", lambda *arguments: (clock.runs.append("all"), raced)[1])
    for text in (" ", "[]", "null", "{}", '{"choice": {}}', '{"choice": 1}', "\xff", *texts):
        cache.store(file, text.encode("latin-1"))
        caplog.clear()
        assert retimed(monkeypatch, clock) == ("b", "timed"), text
        assert sum(str(file) in message and "timed again" in message for message in caplog.messages) == 1
        assert all(record.levelname == "INFO" for record in caplog.records)
        assert json.loads(cache.stored(file))["choice"]["order"] == ["b", "a"]


def test_a_cache_that_cannot_be_written(register, rival, clock, monkeypatch, caplog, card):
    def full(path, binary):
        raise OSError(28, "No space left on device", str(path))
    caplog.set_level("INFO")
    monkeypatch.setattr(tuner, "store", full)
    register(rival("a", 0.002), rival("b", 0.001))
    assert chosen() == "b" and tuner.choices()[0].how == "timed"
    assert sum("cannot be remembered, so it is timed at every start" in text for text in caplog.messages) == 1
    assert retimed(monkeypatch, clock) == ("b", "timed")


# One answer

def test_the_answer_stays(register, rival, clock, monkeypatch):
    """Plans of one process agree, whatever times would say later."""
    slow = rival("a", 0.002)
    register(slow, rival("b", 0.001))
    before = registry.plan(example("int4"), ADA, BF16)
    object.__setattr__(slow, "product", rival("a", 0.0001).product)
    after = registry.plan(example("int4"), ADA, BF16)
    assert before.variant is after.variant and before.variant.name == "b"


def test_two_threads_at_once(register, rival, monkeypatch):
    """One times, the other waits for it."""
    register(rival("a", 0.002), rival("b", 0.001))
    race, gate, raced, names = tuner.race, threading.Barrier(4), [], []
    monkeypatch.setattr(tuner, "race", lambda *arguments: (raced.append(1), race(*arguments))[1])

    def ask():
        gate.wait()
        names.append(chosen())
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == ["b"] * 4 and len(raced) == 1


# Where nothing can be timed

def test_a_device_that_is_not_there(register, rival, clock):
    register(rival("a", 0.002, preference=51), rival("b", 0.001))
    assert registry.plan(example("int4"), ADA._replace(index=None), BF16).variant.name == "a"
    assert not clock.runs and tuner.choices() == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("an illegal memory access"),
                                   KeyError("?"), tuner.NotTimed("no time"), ValueError()])
def test_the_preferred_serves_where_timing_fails(register, rival, monkeypatch, card, error):
    """And goes on serving, whatever could be timed later."""
    def fails(*arguments):
        raise error
    register(rival("a", 0.002, preference=51), rival("b", 0.001))
    with monkeypatch.context() as patch:
        patch.setattr(tuner, "race", fails)
        assert chosen() == "a"
    choice, = tuner.choices()
    assert choice.how == "default" and choice.order == ("a", "b") and choice.why and not any(card.folder.iterdir())
    assert chosen() == "a"


def test_out_of_memory_in_the_middle(register, rival):
    """What was found wrong before stays wrong."""
    def full(out, runs):
        if len(out) == TOKENS:
            raise torch.OutOfMemoryError("CUDA out of memory.")
    register(rival("wrong", 0.0001, at_all_tokens(torch.Tensor.zero_), preference=60), rival("a", 0.001, full),
             rival("b", 0.002))
    assert chosen() == "a" and list(tuner.choices()[0].wrong) == ["wrong"]


def test_inside_a_graph_or_a_compilation(register, rival, monkeypatch, clock):
    register(rival("a", 0.002, preference=51), rival("b", 0.001))
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert chosen() == "a" and "torch.compile" in tuner.choices()[0].why
    assert chosen() == "a" and ("b", TOKENS) not in clock.runs
    another_process(monkeypatch)
    monkeypatch.undo()


def test_no_gpu(monkeypatch, rival):
    """As it is, without a stand-in: this machine's torch says why, and nothing is raised."""
    rivals = [rival("a", 0.002), rival("b", 0.001)]
    monkeypatch.undo()
    if not torch.cuda.is_available():
        choice = tuner._first_choice(rivals, ADA)
        assert choice.how == "default" and choice.order == ("a", "b") and choice.why


def test_capture(monkeypatch, rival):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(tuner.NotTimed, match="CUDA graph"):
        tuner._timed([rival("a", 0.002)], ADA, {})


def test_watch(monkeypatch):
    """The first of a lap runs twice, and only the second counts; one wait for all."""
    said, at = [], iter(range(100))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(at)

        def elapsed_time(self, other):
            return other.at - self.at
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: said.append(index))
    watch = tuner.Watch(3)
    assert watch.times([partial(said.append, "a"), partial(said.append, "b")]) == [0.001, 0.001]
    assert said == [3, "a", "a", "b", 3] and watch.now() <= watch.now()


def test_driver():
    """Something, whatever this machine has."""
    assert isinstance(tuner.driver(), str) if torch.version.cuda else True


@pytest.mark.parametrize("rivals", [3, "", "two words", "../x"])
def test_a_group_is_a_name(rivals):
    with pytest.raises(ValueError, match="rivals is "):
        replace(WEIGHT_ONLY, rivals=rivals)


def test_the_kernels_of_w4a4_are_rivals():
    """Those of one GPU that differ in their main loop alone: rounded alike, fused alike."""
    rivals = {variant.name for variant in registry.VARIANTS if variant.rivals == "w4a4" and not variant.on_request}
    assert rivals == {"w4a4_sm80", "w4a4_fp16n", "w4a4_diag"}
    assert all(len({(variant.precisions, variant.activations, variant.epilogues, variant.modulates is None,
                     variant.feeds is None) for variant in registry.VARIANTS if variant.rivals == group}) == 1
               for group in {variant.rivals for variant in registry.VARIANTS} - {None})


@needs_gxx
def test_real_rivals(monkeypatch):
    """Those of a GPU, in the emulator: each packs its weights, runs and is right; equally fast ones keep their order. All
    quantise what an MLP has in its middle where they make it."""
    emulator = Emulator()
    monkeypatch.setattr(launch, "launch", emulator.launch)
    monkeypatch.setattr(launch, "shared_memory", lambda device: 164 << 10)
    monkeypatch.setattr(check, "kinds_of", KINDS_OF)
    monkeypatch.setattr(tuner, "SHAPE", (130, 256, 256, 32))
    monkeypatch.setattr(tuner, "LAPS", tuner.LEAST)
    monkeypatch.setattr(tuner, "FEW", 1)
    target, clock = Target("cuda", (8, 0), 0), Clock()
    rivals = [variant for variant in registry.VARIANTS if variant.rivals == "w4a4" and variant.made_for(target)
              and not variant.on_request]

    def times(runs):
        for run in runs:
            run()
        return [0.001] * len(runs)
    clock.times = times
    wrong = {}
    choice = tuner.race(rivals, target, clock, wrong, "cpu")
    assert choice.order == tuple(variant.name for variant in rivals) == ("w4a4_diag", "w4a4_sm80", "w4a4_fp16n") and not wrong
    launched = collections.Counter(emulator.launched)
    assert min(launched[name] for name in ("mlp_w4a4_bf16_u4", "mlp_w4a4_normal_bf16_u4_fp16n", "adaln_int4_bf16",
                                           "mlp_w4a4_normal_bf16_u4_diag", "adaln_int4_normal_bf16")) > tuner.LEAST
    assert sum(launched[name] for name in launched if name.startswith("quant_down")) == 0
