"""Layouts against the golden files, bit for bit, and against the format's index formulas on random data."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from svdq_pack.svdq.kernels import layout
from svdq_pack.svdq.kernels.errors import ShapeError

FP8 = torch.float8_e4m3fn
LINEARS = ["linear_int4_r32", "linear_int4_nobias_r16", "linear_int4_padded_n192_k192_r20", "linear_int4_unsigned_fc2_r16",
           "linear_int4_smooth_fused_r16", "linear_nvfp4_wtscale_r32", "linear_nvfp4_wcscales_qkv_r16"]
AWQS = ["awq_adanorm_zero", "awq_plain_k1024", "awq_text_encoder_g128"]


def transposed(convert):
    """The golden files keep proj_down as D[R, K]; ours is [K, R]."""
    return lambda tensor: convert(tensor.t())


PAIRS = {  # golden name -> (logical -> packed, packed -> logical)
    "int4": (layout.pack_codes, lambda qweight: layout.signed(layout.unpack_codes(qweight))),
    "e2m1": (layout.pack_codes, layout.unpack_codes),
    "scale_g64": (layout.pack_scales, layout.unpack_scales),
    "scale_g16_fp8": (layout.pack_scales, layout.unpack_scales),
    "vector": (layout.pack_vector, layout.unpack_vector),
    "lora_down": (transposed(layout.pack_down), lambda stored: layout.unpack_down(stored).t()),
    "lora_up": (layout.pack_up, layout.unpack_up),
}


def assert_bits(got, want):
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert torch.equal(got.flatten().view(torch.uint8), want.flatten().view(torch.uint8))


def random_bits(shape, dtype, seed=0):
    """Every bit pattern, NaNs with payload included."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).view(shape)


def grid(rows, columns):
    return torch.arange(rows)[:, None], torch.arange(columns)[None, :]


# Golden files

@pytest.mark.parametrize("name", PAIRS)
def test_golden_vectors(golden, name):
    tensors, (pack, unpack) = golden("packing_vectors"), PAIRS[name]
    assert_bits(pack(tensors[f"{name}.logical"]), tensors[f"{name}.packed"])
    assert_bits(unpack(tensors[f"{name}.packed"]), tensors[f"{name}.logical"])


def test_golden_awq(golden):
    tensors = golden("packing_vectors")
    assert_bits(layout.pack_awq(tensors["awq.logical"]), tensors["awq.packed_int32"])
    assert_bits(layout.unpack_awq(tensors["awq.packed_int32"]), tensors["awq.logical"])
    assert_bits(layout.unpack_awq(tensors["awq.packed_int16"]), tensors["awq.logical"])


@pytest.mark.parametrize("name", LINEARS)
def test_golden_layers(golden, name):
    tensors = golden(name)
    logical = {key.removeprefix("logical."): value for key, value in tensors.items() if key.startswith("logical.")}
    int4 = logical["codes"].dtype == torch.int8
    group = layout.GROUP["int4" if int4 else "nvfp4"]
    scales = (128, 128 // group)
    rules = {  # stored name -> (what PAIRS calls it, padding, filled with)
        "qweight": ("int4" if int4 else "e2m1", (128, 128), 0), "wscales": ("scale_g64", scales, 1),
        "lora_down": ("lora_down", (16, 128), 0), "lora_up": ("lora_up", (128, 16), 0),
        "bias": ("vector", (128,), 1), "smooth": ("vector", (128,), 1), "smooth_orig": ("vector", (128,), 1),
        "wcscales": ("vector", (128,), 1),
    }
    logical["qweight"] = logical.pop("codes")
    checked = 0
    for key, (pair, multiples, fill) in rules.items():
        if f"packed.{key}" in tensors:
            pack, unpack = PAIRS[pair]
            padded = layout.pad(logical[key], *multiples, fill=fill)
            assert_bits(pack(padded), tensors[f"packed.{key}"])
            assert_bits(unpack(tensors[f"packed.{key}"]), padded)
            checked += 1
    assert checked >= 7


@pytest.mark.parametrize("name", AWQS)
def test_golden_awq_layers(golden, name):
    tensors = golden(name)
    codes, qweight = tensors["logical.codes"], tensors["packed.qweight"]
    if name == "awq_adanorm_zero":  # stored row 6i + c is row i of chunk c
        rows = torch.arange(len(codes)).view(6, -1).t().flatten()
        assert_bits(layout.unpack_awq(qweight), codes[rows])
        assert_bits(layout.permute_awq_rows(qweight, rows.argsort()), layout.pack_awq(codes))
        codes = codes[rows]
    assert_bits(layout.unpack_awq(qweight), codes)
    assert_bits(layout.pack_awq(codes).view(qweight.dtype), qweight)


# Index formulas of checkpoint-format 5, written as there

@pytest.mark.parametrize("N, K", [(128, 64), (128, 320), (384, 128), (256, 192)])
def test_codes_formula(N, K):
    codes = random_bits((N, K), torch.uint8) & 15
    n, k = grid(N, K)
    word = ((((n >> 7) * (K // 64) + (k >> 6)) * 8 + ((n >> 4) & 7)) * 8 + (n & 7)) * 4 + ((k >> 3) & 3)
    word = word * 4 + ((n >> 3) & 1) * 2 + ((k >> 5) & 1)
    byte, nibble = word * 4 + ((k & 7) >> 1), k & 1
    stored = layout.pack_codes(codes)
    assert torch.equal((stored.flatten().view(torch.uint8)[byte] >> (4 * nibble)) & 15, codes)
    assert_bits(layout.unpack_codes(stored), codes)
    assert_bits(layout.pack_codes(layout.signed(codes)), stored)


@pytest.mark.parametrize("N, G", [(128, 1), (128, 48), (384, 3), (256, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales16_formula(N, G, dtype):
    wscales = random_bits((N, G), dtype)
    n, g = grid(N, G)
    flat = ((n >> 7) * G + g) * 128 + ((n >> 4) & 7) * 16 + ((n >> 1) & 3) * 4 + ((n >> 3) & 1) * 2 + (n & 1)
    stored = layout.pack_scales(wscales)
    assert stored.shape == (G, N)
    assert_bits(stored.flatten()[flat], wscales)
    assert_bits(layout.unpack_scales(stored), wscales)


@pytest.mark.parametrize("N, G", [(128, 4), (128, 20), (384, 8)])
def test_scales8_formula(N, G):
    wscales = random_bits((N, G), FP8)
    n, g = grid(N, G)
    flat = (((n >> 7) * (G // 4) + (g >> 2)) * 128 + (n & 7) * 16 + ((n >> 3) & 3) * 4 + ((n >> 5) & 3)) * 4 + (g & 3)
    stored = layout.pack_scales(wscales)
    assert stored.shape == (G, N)
    assert torch.equal(stored.flatten().view(torch.uint8)[flat], wscales.view(torch.uint8))
    assert_bits(layout.unpack_scales(stored), wscales)


@pytest.mark.parametrize("N", [128, 640])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_vector_formula(N, dtype):
    vector = random_bits((N,), dtype)
    n = torch.arange(N)
    flat = (n >> 7) * 128 + ((n >> 4) & 7) * 16 + ((n >> 1) & 3) * 4 + ((n >> 3) & 1) * 2 + (n & 1)
    assert_bits(layout.pack_vector(vector)[flat], vector)
    assert_bits(layout.unpack_vector(layout.pack_vector(vector)), vector)
    order = layout.pack_vector(torch.arange(128))
    assert order[:16].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]


@pytest.mark.parametrize("rows, R", [(16, 16), (128, 48), (400, 32), (128, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_rank_formulas(rows, R, dtype):
    logical = random_bits((rows, R), dtype)
    k, r = grid(rows, R)
    down = (((((k >> 4) * (R // 16) + (r >> 4)) * 8 + (r & 7)) * 4 + ((k >> 1) & 3)) * 2 + ((r >> 3) & 1)) * 4 \
        + ((k >> 3) & 1) * 2 + (k & 1)
    n = k
    up = (((((n >> 4) * (R // 16) + (r >> 4)) * 8 + (n & 7)) * 4 + ((r >> 1) & 3)) * 2 + ((n >> 3) & 1)) * 4 \
        + ((r >> 3) & 1) * 2 + (r & 1)
    for pack, unpack, flat in ((layout.pack_down, layout.unpack_down, down), (layout.pack_up, layout.unpack_up, up)):
        stored = pack(logical)
        assert stored.shape == logical.shape
        assert_bits(stored.flatten()[flat], logical)
        assert_bits(unpack(stored), logical)


@pytest.mark.parametrize("N, K", [(4, 64), (12, 192), (128, 3072)])
def test_awq_formula(N, K):
    codes = random_bits((N, K), torch.uint8) & 15
    n, k = grid(N, K)
    i16 = ((n >> 2) * (K // 64) + (k >> 6)) * 64 + (n & 3) * 16 + ((k >> 5) & 1) * 8 + (k & 7)
    stored = layout.pack_awq(codes)
    assert (stored.dtype, stored.shape) == (torch.int32, (N // 4, K // 2))
    words = stored.flatten()[i16 >> 1]
    assert torch.equal((words >> (16 * (i16 & 1) + 4 * ((k >> 3) & 3))) & 15, codes.int())
    assert_bits(layout.unpack_awq(stored), codes)
    assert_bits(layout.unpack_awq(stored.view(torch.int16)), codes)


def test_awq_rows():
    codes = random_bits((24, 128), torch.uint8) & 15
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    stored = layout.pack_awq(codes)
    for qweight in (stored, stored.view(torch.int16)):
        assert_bits(layout.permute_awq_rows(qweight, order), layout.pack_awq(codes[order]).view(qweight.dtype))
    assert_bits(layout.permute_awq_rows(stored, order[:8]), layout.pack_awq(codes[order[:8]]))


# Values, padding, strides, memory, errors

def test_values():
    nibbles = torch.arange(16, dtype=torch.uint8)
    assert layout.signed(nibbles).tolist() == [*range(8), *range(-8, 0)]
    # Built from the fields: sign, exponent with bias 1, one bit of mantissa, subnormal at exponent 0.
    for code in range(16):
        exponent, mantissa = (code >> 1) & 3, code & 1
        value = 2 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
        assert layout.E2M1[code] == (-value if code & 8 else value)
    assert not layout.e2m1(nibbles).signbit()[8], "code 8 is a plain zero"
    assert torch.equal(layout.e2m1(nibbles.view(4, 4)), layout.E2M1.view(4, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_by_tables(dtype):
    qweight = layout.pack_codes(random_bits((256, 192), torch.uint8))
    codes = layout.unpack_codes(qweight)
    wanted = {"int4": layout.signed(codes).to(dtype), "nvfp4": layout.e2m1(codes).to(dtype)}
    assert_bits(layout.unpack_e2m1(qweight, dtype), wanted["nvfp4"])
    assert_bits(layout.unpack_int4(qweight), layout.signed(codes))
    for precision, want in wanted.items():
        out = torch.full((256, 192), math.nan, dtype=dtype)
        assert layout.unpack_values(qweight, precision, out) is out
        assert_bits(out, want)


def test_unpacking_elsewhere_than_on_cpus():
    """A tensor of another type takes the way that other devices take."""
    for unpack, stored in [(layout.unpack_codes, layout.pack_codes(random_bits((256, 192), torch.uint8))),
                           (layout.unpack_int4, layout.pack_codes(random_bits((256, 192), torch.uint8))),
                           (layout.unpack_scales, random_bits((12, 256), FP8)),
                           (layout.unpack_scales, random_bits((3, 256), torch.bfloat16)),
                           (layout.unpack_vector, random_bits((256,), torch.bfloat16)),
                           (layout.unpack_down, random_bits((256, 48), torch.bfloat16)),
                           (layout.unpack_up, random_bits((256, 48), torch.float32)),
                           (layout.unpack_awq, random_bits((64, 64), torch.int32))]:
        other = torch.nn.Parameter(stored, requires_grad=False)
        assert not layout.on_cpu(other) and layout.on_cpu(stored)
        assert_bits(unpack(other).data, unpack(stored))


def test_only_the_low_nibble_is_stored():
    codes = random_bits((128, 64), torch.uint8)
    assert_bits(layout.pack_codes(codes), layout.pack_codes(codes & 15))
    assert_bits(layout.pack_awq(codes), layout.pack_awq(codes & 15))


def test_pad():
    tensor = torch.ones(3, 16)
    padded = layout.pad(tensor, 4, 16, fill=2)
    assert padded.shape == (4, 16) and (padded[:3] == 1).all() and (padded[3] == 2).all()
    assert_bits(layout.pad(padded, 4, 16), padded)
    assert layout.pad(tensor.to(FP8), 4, 8, fill=1).float().sum() == 64


def test_any_stride():
    codes = random_bits((64, 128), torch.uint8) & 15
    assert_bits(layout.pack_codes(codes.t()), layout.pack_codes(codes.t().contiguous()))
    stored = layout.pack_codes(random_bits((256, 128), torch.uint8))
    wide = torch.cat((stored, stored), 1)
    assert_bits(layout.unpack_codes(wide[:, :64]), layout.unpack_codes(stored))
    scales = random_bits((128, 8), FP8)
    assert_bits(layout.pack_scales(scales.t().contiguous().t()), layout.pack_scales(scales))


class LargestTensor(TorchDispatchMode):
    """Remembers the size in bytes of the largest tensor any operation returned."""
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.numel() * result.element_size())
        return result


@pytest.mark.parametrize("pack, unpack", [(layout.pack_codes, layout.unpack_codes), (layout.pack_awq, layout.unpack_awq)])
def test_no_temporary_exceeds_a_byte_per_code(pack, unpack):
    codes = random_bits((256, 512), torch.uint8) & 15
    with LargestTensor() as largest:
        unpack(pack(codes))
    assert 0 < largest.size <= codes.numel()


def test_values_take_no_wide_index():
    with LargestTensor() as largest:
        layout.e2m1(torch.zeros(256, 512, dtype=torch.uint8))
    assert largest.size == 256 * 512 * 4


@pytest.mark.parametrize("call, message", [
    (lambda: layout.pack_codes(torch.zeros(100, 64, dtype=torch.uint8)), r"pack_codes: got \[100, 64\] .*N % 128 == 0"),
    (lambda: layout.pack_codes(torch.zeros(128, 64)), r"pack_codes: got .*float32.*Needs uint8 \| int8"),
    (lambda: layout.unpack_codes(torch.zeros(128, 48, dtype=torch.int8)), r"unpack_codes: got .*K/2 % 32 == 0"),
    (lambda: layout.pack_scales(torch.zeros(128, 2)), r"pack_scales: got .*float32.*Needs bfloat16"),
    (lambda: layout.pack_scales(torch.zeros(128, 2).to(FP8)), r"pack_scales: got .*G % 4 == 0"),
    (lambda: layout.unpack_scales(torch.zeros(2, 100).bfloat16()), r"unpack_scales: got .*N % 128 == 0"),
    (lambda: layout.pack_vector(torch.zeros(128, 1)), r"pack_vector: got \[128, 1\].*Needs \[N\]"),
    (lambda: layout.unpack_vector(torch.zeros(130)), r"unpack_vector: got \[130\]"),
    (lambda: layout.pack_down(torch.zeros(64, 20)), r"pack_down: got \[64, 20\].*R % 16 == 0"),
    (lambda: layout.unpack_up(torch.zeros(8, 16)), r"unpack_up: got \[8, 16\].*N % 16 == 0"),
    (lambda: layout.pack_awq(torch.zeros(6, 64, dtype=torch.uint8)), r"pack_awq: got \[6, 64\].*N % 4 == 0"),
    (lambda: layout.unpack_awq(torch.zeros(4, 32, dtype=torch.int64)), r"unpack_awq: got .*int64.*Needs int32 \| int16"),
    (lambda: layout.permute_awq_rows(torch.zeros(4, 32, dtype=torch.int32), torch.arange(6)), r"order: got \[6\]"),
])
def test_errors_say_what_is_needed(call, message):
    with pytest.raises(ShapeError, match=message):
        call()
