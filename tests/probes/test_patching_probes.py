"""Attribution, activation and path patching, circuit overlap: against hooks on projections, TransformerLens, and the bundled model."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headscope as hs
from headscope.errors import DataError, HeadscopeError, ProbeError
from headscope.models.bundled import BUNDLED
from headscope.probes import ActivationPatching, CircuitOverlap, LogitAttribution, PathPatching
from headscope.probes.circuit_overlap import overlap
from headscope.probes.contrast import ContrastPairs, contrast, solve
from headscope.probes.contrast_tasks import TASKS, arithmetic, ioi, repeat, single_token_names
from headscope.probes.logit_attribution import attribute
from headscope.probes.stream import all_weights, read_stream
from headscope.scope import Scope

HEADS, WIDTH = 4, 8


def llama() -> LlamaForCausalLM:
    """Random, float64, grouped queries, with MLPs."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=WIDTH,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    model = LlamaForCausalLM(config).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def scope(model):
    return Scope(model, name="tiny")


@pytest.fixture(scope="module")
def pairs(scope):
    """Random texts of two lengths; what the model happens to answer is right, so that it solves them all."""
    torch.manual_seed(6)
    clean = [torch.randint(61, (length,)) for length in (9, 9, 12, 9)]
    corrupt = [one.clone() for one in clean]
    for one in corrupt:
        one[2:4] = torch.randint(61, (2,))
    with torch.no_grad():
        logits = [[scope.model(input_ids=one[None]).logits[0, -1] for one in listed] for listed in (clean, corrupt)]
    answers = torch.stack([(a - b).argmax() for a, b in zip(*logits, strict=True)])
    wrongs = torch.stack([(a - b).argmin() for a, b in zip(*logits, strict=True)])
    made = ContrastPairs(tuple(clean), tuple(corrupt), answers, wrongs, "random")
    kept = [i for i in range(4) if logits[0][i][answers[i]] > logits[0][i][wrongs[i]]]
    assert len({len(clean[i]) for i in kept}) == 2
    return made.select(kept)


@pytest.fixture(scope="module")
def bundled():
    return hs.load("bundled:induction")


# --- an oracle that knows nothing of the seam: hooks on the projections ----------------------------------------------------------------


class Hooked:
    """Runs of a Llama with a head's part of o_proj's or q_proj's input or output, or an MLP's output, recorded or replaced."""

    def __init__(self, model, ids):
        self.model, self.ids = model, ids

    def sites(self, name):
        for layer, block in enumerate(self.model.model.layers):
            yield layer, {"z": block.self_attn.o_proj, "q": block.self_attn.q_proj, "mlp": block.mlp}[name]

    def run(self, replace=(), record=()):
        """`replace`: (site, layer, head or None, rows, values [n, ., heads * width]); gives (last logits, (site, layer) -> values)."""
        seen = {}
        with ExitStack() as stack:
            for site in ("z", "q", "mlp"):
                for layer, module in self.sites(site):
                    mine = [one for one in replace if one[0] == site and one[1] == layer]

                    def edit(value, mine=mine, site=site, layer=layer):
                        if site in record:
                            seen[site, layer] = value.clone()
                        value = value.clone()
                        for _, _, head, rows, values in mine:
                            part = slice(None) if head is None else slice(head * WIDTH, (head + 1) * WIDTH)
                            value[:, rows, part] = values[:, rows, part]
                        return value

                    if site == "z":
                        stack.callback(module.register_forward_pre_hook(lambda m, args, edit=edit: (edit(args[0]),)).remove)
                    else:
                        stack.callback(module.register_forward_hook(lambda m, args, out, edit=edit: edit(out)).remove)
            with torch.no_grad():
                return self.model(input_ids=self.ids).logits[:, -1], seen


def ids_of(listed):
    return torch.stack(list(listed))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_activation_patching_is_what_hooks_give(model, scope, pairs, direction, positions):
    result = ActivationPatching(direction=direction, positions=positions).run(scope, pairs)
    clean, corrupt, patched = 0.0, 0.0, torch.zeros(3, HEADS, dtype=torch.float64)
    for part in pairs.batches(16):
        texts = ids_of(part.clean), ids_of(part.corrupt)
        source, target = texts if direction == "denoise" else texts[::-1]
        rows = slice(None) if positions == "all" else slice(-1, None)
        _, kept = Hooked(model, source).run(record=("z",))
        clean += float(contrast(Hooked(model, texts[0]).run()[0], part).sum())
        corrupt += float(contrast(Hooked(model, texts[1]).run()[0], part).sum())
        for layer in range(3):
            for head in range(HEADS):
                logits, _ = Hooked(model, target).run(replace=[("z", layer, head, rows, kept["z", layer])])
                patched[layer, head] += contrast(logits, part).sum()
    low, high = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    torch.testing.assert_close(result["activation_patching"], (patched - low) / (high - low), rtol=1e-9, atol=1e-9)
    assert result.numbers["logit_difference_clean"] == pytest.approx(clean / len(pairs))


def test_queries_keys_and_values_are_patched_too(model, scope, pairs):
    """q of a head as the hook on q_proj gives it (rotary embedding turns both alike); k and v stand for the group."""
    result = ActivationPatching(at="q").run(scope, pairs)
    total, want = [0.0, 0.0], torch.zeros(3, HEADS, dtype=torch.float64)
    for part in pairs.batches(16):
        _, kept = Hooked(model, ids_of(part.clean)).run(record=("q",))
        total[0] += float(contrast(Hooked(model, ids_of(part.corrupt)).run()[0], part).sum())
        total[1] += float(contrast(Hooked(model, ids_of(part.clean)).run()[0], part).sum())
        for layer in range(3):
            for head in range(HEADS):
                edit = [("q", layer, head, slice(None), kept["q", layer])]
                want[layer, head] += contrast(Hooked(model, ids_of(part.corrupt)).run(replace=edit)[0], part).sum()
    torch.testing.assert_close(result["activation_patching"], (want - total[0]) / (total[1] - total[0]), rtol=1e-9, atol=1e-9)
    for site in ("k", "v"):
        scores = ActivationPatching(at=site).run(scope, pairs)["activation_patching"]
        assert torch.equal(scores[:, 0], scores[:, 1])
        assert not torch.equal(scores[:, 1], scores[:, 2])


@pytest.mark.parametrize("freeze", [True, False])
def test_path_patching_is_what_hooks_give(model, scope, pairs, freeze):
    """The direct path and the path into the queries of two heads, each written out with hooks: sender corrupted, all else frozen clean."""
    receivers = ((1, 3), (2, 0))
    direct = PathPatching(freeze_mlps=freeze).run(scope, pairs)["path_patching"]
    into = PathPatching(freeze_mlps=freeze, receivers=receivers, at="q").run(scope, pairs)["path_patching"]
    last = slice(-1, None)
    ends, want = [0.0, 0.0], {name: torch.zeros(3, HEADS, dtype=torch.float64) for name in ("direct", "into")}
    for part in pairs.batches(16):
        clean = Hooked(model, ids_of(part.clean))
        logits, kept = clean.run(record=("z", "mlp", "q"))
        other, spoilt = Hooked(model, ids_of(part.corrupt)).run(record=("z",))
        ends[0] += float(contrast(logits, part).sum())
        ends[1] += float(contrast(other, part).sum())
        for layer in range(3):
            for head in range(HEADS):
                edits = [("z", one, h, last, kept["z", one]) for one in range(3) for h in range(HEADS) if (one, h) != (layer, head)]
                edits += [("mlp", one, None, last, kept["mlp", one]) for one in range(3) if freeze]
                edits.append(("z", layer, head, last, spoilt["z", layer]))
                logits, seen = clean.run(replace=edits, record=("q",))
                want["direct"][layer, head] += contrast(logits, part).sum()
                edits = [("q", one, h, last, seen["q", one]) for one, h in receivers]
                want["into"][layer, head] += contrast(clean.run(replace=edits)[0], part).sum()
    for name, found in (("direct", direct), ("into", into)):
        torch.testing.assert_close(found, (want[name] - ends[0]) / (ends[1] - ends[0]), rtol=1e-9, atol=1e-9)
    assert into[2].abs().max() < 1e-12, "a head tells nothing to heads of its own layer or before"


@torch.no_grad()
def test_parts_of_the_logits_add_up(model, scope, pairs):
    """Heads as attributed, plus the embedding and the MLPs through the same frozen norm, are the logit difference exactly."""
    result = LogitAttribution().run(scope, pairs)
    total, head_sum = 0.0, torch.zeros(3, HEADS, dtype=torch.float64)
    for part in pairs.batches(16):
        rest = {}
        with ExitStack() as stack:
            watched = {"embedding": model.model.embed_tokens, **{f"mlp {i}": block.mlp for i, block in enumerate(model.model.layers)}}
            for name, module in watched.items():
                keep = module.register_forward_hook(lambda m, args, out, name=name, rest=rest: rest.__setitem__(name, out[:, -1]))
                stack.callback(keep.remove)
            logits, seen = Hooked(model, ids_of(part.clean)).run(record=("z",))
        unembed = model.lm_head.weight
        direction = (unembed[part.answers] - unembed[part.wrongs]) * model.model.norm.weight
        parts = {}
        for layer, block in enumerate(model.model.layers):
            for head in range(HEADS):
                own = slice(head * WIDTH, (head + 1) * WIDTH)
                parts[layer, head] = seen["z", layer][:, -1, own] @ block.self_attn.o_proj.weight[:, own].T
        stream = sum(rest.values()) + sum(parts.values())
        scale = (stream.square().mean(-1) + model.config.rms_norm_eps).rsqrt()
        torch.testing.assert_close((stream * direction).sum(-1) * scale, contrast(logits, part))
        for place, value in parts.items():
            head_sum[place] += ((value * direction).sum(-1) * scale).sum()
        total += float(contrast(logits, part).sum())
    torch.testing.assert_close(result["logit_attribution"], head_sum / len(pairs), rtol=1e-8, atol=1e-8)
    assert result.numbers["logit_difference"] == pytest.approx(total / len(pairs))
    numbers = result.numbers
    assert numbers["attributed_to_heads"] + numbers["attributed_to_the_rest"] == pytest.approx(numbers["logit_difference"])


@torch.no_grad()
def test_norms_behind_the_heads_are_frozen_as_well():
    """Gemma 2 normalises what attention gives: heads, through that norm and the last, add up to what the layer really added."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(7)
    config = Gemma2Config(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
        final_logit_softcapping=5.0,
    )
    model = Gemma2ForCausalLM(config).double().eval()
    for name, parameter in model.named_parameters():
        if "layernorm" in name or name.endswith("norm.weight"):
            parameter.data.uniform_(-0.5, 0.5)
    scope = Scope(model)
    made = ContrastPairs((torch.arange(8),), (torch.arange(8).flip(0),), torch.tensor([3]), torch.tensor([9]))
    stream = read_stream(scope)
    assert stream.layers[1].writes is not None
    found = attribute(scope, made, stream, all_weights(scope))
    added, ends = {}, {}
    with ExitStack() as stack:
        for i, block in enumerate(model.model.layers):
            keep = block.post_attention_layernorm.register_forward_hook(lambda m, args, out, i=i: added.__setitem__(i, out[0, -1]))
            stack.callback(keep.remove)
        keep = model.model.norm.register_forward_hook(lambda m, args, out: ends.update(x=args[0][0, -1], y=out[0, -1]))
        stack.callback(keep.remove)
        model(input_ids=made.clean[0][None])
    direction = (model.lm_head.weight[3] - model.lm_head.weight[9]) * (1 + model.model.norm.weight)
    scale = (ends["x"].square().mean() + config.rms_norm_eps).rsqrt()
    for layer in range(2):
        assert float(found[f"layer {layer}"].sum()) == pytest.approx(float((added[layer] * direction).sum() * scale), rel=1e-5)
    assert float(found["read"][0]) != pytest.approx(float(found["logits"][0]), rel=1e-2), "the cap is seen"


# --- the bundled model, whose heads are known ---------------------------------------------------------------------------------------------


def test_patching_finds_the_bundled_heads(bundled):
    """Restoring the previous-token heads restores the answer; their path goes into the induction heads' keys; those write the answer."""
    truth = BUNDLED["induction"].truth
    feeders, readers = ({tuple(place) for place in truth[name]} for name in ("previous_token", "induction"))
    patched = ActivationPatching(task="repeat").run(bundled)
    assert set(patched.top(n=len(feeders))) == feeders
    assert sum(float(patched["activation_patching"][place]) for place in feeders) > 0.9
    assert patched.numbers["all_heads"] == pytest.approx(1, abs=1e-6)
    paths = PathPatching(task="repeat", receivers=tuple(sorted(readers)), at="k", position="all").run(bundled)
    assert set(paths.top(n=len(feeders))) == feeders
    assert sum(float(paths["path_patching"][place]) for place in feeders) > 0.9
    direct = PathPatching(task="repeat").run(bundled)
    written = LogitAttribution(task="repeat").run(bundled)
    for found in (direct, written):
        assert set(found.top(n=len(readers))) == readers
    assert sum(float(direct["path_patching"][place]) for place in readers) > 0.5
    assert direct.numbers["all_heads"] == pytest.approx(1, abs=1e-6), "full corruption: only heads write at the last token"
    assert sum(float(written["logit_attribution"][place]) for place in readers) > 0.9 * written.numbers["logit_difference"]


def test_patching_a_run_with_itself_is_nothing(bundled):
    """Clean activations in the clean run: every head's patch, and all of them at once, leave every bit as it was."""
    generator = torch.Generator().manual_seed(1)
    made = repeat(bundled, 8, generator)
    same = solve(bundled, made, 16, "test")
    from headscope.probes.activation_patching import Patcher

    twin = ContrastPairs(made.clean, made.clean, made.answers, made.wrongs)
    patcher = Patcher(bundled, twin, True, "z", "all")
    for layer in range(2):
        rows = patcher.layer(layer)["patched"]
        assert torch.equal(rows, rows[:1].expand_as(rows))
        torch.testing.assert_close(rows[0], same.clean, rtol=0, atol=1e-5)
    assert torch.equal(patcher.every()["patched"], patcher.layer(0)["patched"][0])


@torch.no_grad()
def test_transformer_lens_patches_and_attributes_alike(bundled):
    """get_act_patch_attn_head_out_all_pos and the cache's head results through its own frozen norm, on the same texts."""
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    model = copy.deepcopy(bundled.model)
    bridge = TransformerBridge.boot_transformers("induction", hf_model=model, tokenizer=bundled.tokenizer, device="cpu")
    made = solve(bundled, repeat(bundled, 12, torch.Generator().manual_seed(0)), 16, "test").pairs
    clean, corrupt = ids_of(made.clean), ids_of(made.corrupt)
    truth, cache = bridge.run_with_cache(clean)
    low, high = (float(contrast(bridge(one)[:, -1], made).mean()) for one in (corrupt, clean))
    metric = patching.get_act_patch_attn_head_out_all_pos(bridge, corrupt, cache, lambda out: contrast(out[:, -1], made).mean())
    theirs = (metric.double() - low) / (high - low)
    ours = ActivationPatching(task="repeat").run(bundled, made)["activation_patching"]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    norm, scale = model.model.norm, cache["ln_final.hook_scale"][:, -1]
    direction = (model.lm_head.weight[made.answers] - model.lm_head.weight[made.wrongs]) * norm.weight
    written = LogitAttribution(task="repeat").run(bundled, made)["logit_attribution"]
    for layer in range(2):
        z = cache[f"blocks.{layer}.attn.hook_z"][:, -1].reshape(len(made), 4, -1)
        results = torch.einsum("nhv,hvd->nhd", z, bridge.W_O[layer])
        want = (results * direction[:, None]).sum(-1) / scale
        torch.testing.assert_close(written[layer], want.mean(0).double(), rtol=1e-3, atol=1e-3)
    assert float(contrast(truth[:, -1], made).mean()) == pytest.approx(high)


def test_a_killed_run_goes_on(bundled, tmp_path, monkeypatch):
    """A journal of some batches and layers: the second run asks the model for the others only, and gives the same numbers."""
    from headscope.probes import activation_patching as module

    probe = ActivationPatching(task="repeat", pairs=8, batch=4)
    want = probe.run(bundled)
    asked = []
    whole = module.Patcher.layer

    def until(self, layer):
        asked.append(layer)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return whole(self, layer)

    monkeypatch.setattr(module.Patcher, "layer", until)
    with pytest.raises(KeyboardInterrupt):
        probe.run(bundled, journal=tmp_path / "units")
    found = probe.run(bundled, journal=tmp_path / "units")
    assert len(asked) == 3 + 2, "two of the four units were kept"
    assert torch.equal(found["activation_patching"], want["activation_patching"])


# --- overlap ------------------------------------------------------------------------------------------------------------------------------


def test_overlap_of_two_tables():
    """Sets and ranks worked out by hand."""
    first = torch.tensor([[4.0, -3.0, 2.0], [1.0, 0.5, float("nan")]])
    second = torch.tensor([[-5.0, 0.1, 3.0], [0.2, 4.0, float("nan")]])
    found = overlap(first, second, top=2)
    assert found["circuit_jaccard"] == pytest.approx(1 / 3)  # {0.0, 0.1} and {0.0, 1.1}
    assert found["circuit_share"] == 0.5
    assert found["circuit_chance"] == 0.4
    assert found["circuit_spearman"] == pytest.approx(1 - 6 * (0 + 9 + 0 + 0 + 9) / (5 * 24))  # ranks 5 4 3 2 1 and 5 1 3 2 4
    assert overlap(first, second, top=2, by="value")["circuit_share"] == 0.5  # {0.0, 0.2} and {1.1, 0.2}
    assert overlap(first, first, top=3)["circuit_jaccard"] == 1
    with pytest.raises(ProbeError, match="there are 5 heads"):
        overlap(first, second, top=6)
    with pytest.raises(ProbeError, match="of different models"):
        overlap(first, second[:1], top=2)


def test_circuit_overlap_of_a_task_with_itself_and_with_another(scope, bundled, pairs):
    probe = CircuitOverlap(first="repeat", second="repeat", pairs=8, top=0.25)
    same = probe.run(bundled)
    assert same.numbers["circuit_jaccard"] == 1
    assert same.numbers["circuit_spearman"] == pytest.approx(1)
    assert same.numbers["circuit_heads"] == 2
    assert sorted(same["circuit_shared"].flatten().tolist()) == [0.0] * 6 + [1.0] * 2
    half = ContrastPairs(pairs.clean[:1], pairs.corrupt[:1], pairs.answers[:1], pairs.wrongs[:1])
    for method, single in (("path", PathPatching()), ("attribution", LogitAttribution())):
        found = CircuitOverlap(method=method).run(scope, {"first": pairs, "second": half})
        torch.testing.assert_close(found["circuit_first"], single.run(scope, pairs)[single.name])
        torch.testing.assert_close(found["circuit_second"], single.run(scope, half)[single.name])


# --- data and refusals --------------------------------------------------------------------------------------------------------------------


def test_tasks_of_words(smollm2):
    """Names are one token each; the texts of a pair differ in names or numbers only; the answer is the other person, or the result."""
    tokenizer = smollm2.text_tokenizer
    names = single_token_names(smollm2)
    assert len(names) > 50
    made = ioi(smollm2, 16, torch.Generator().manual_seed(0))
    first = 0
    for clean, corrupt, answer, wrong in zip(made.clean, made.corrupt, made.answers, made.wrongs, strict=True):
        text = tokenizer.decode(clean)
        words = [word.strip(",") for word in text.split()]
        said = [word for word in words if word in names]
        subject = next(name for name in said if said.count(name) == 2)
        (other,) = set(said) - {subject}
        assert tokenizer.decode(answer) == f" {other}"
        assert tokenizer.decode(wrong) == f" {subject}"
        assert (clean != corrupt).sum() == 1
        assert tokenizer.decode(corrupt[clean != corrupt]) == f" {other}"
        first += said[0] == subject
    assert first == 8
    made = ioi(smollm2, 4, torch.Generator().manual_seed(0), "abc")
    assert all((clean != corrupt).sum() == 3 for clean, corrupt in zip(made.clean, made.corrupt, strict=True))
    made = arithmetic(smollm2, 12, torch.Generator().manual_seed(0))
    for clean, corrupt, answer, wrong in zip(made.clean, made.corrupt, made.answers, made.wrongs, strict=True):
        for ids, right in ((clean, answer), (corrupt, wrong)):
            asked = tokenizer.decode(ids).split("\n")[-1]
            assert eval(asked.rstrip("=")) == int(tokenizer.decode(right))
        assert (clean != corrupt).sum() == 1


def test_task_of_tokens(bundled):
    made = repeat(bundled, 8, torch.Generator().manual_seed(0))
    for clean, corrupt, answer, wrong in zip(made.clean, made.corrupt, made.answers, made.wrongs, strict=True):
        for ids, right in ((clean, answer), (corrupt, wrong)):
            earlier = (ids[:-1] == ids[-1]).nonzero().flatten()
            assert len(earlier) == 1
            assert ids[int(earlier) + 1] == right
        assert (clean != corrupt).sum() == 2
    assert set(TASKS) == {"ioi", "arithmetic", "repeat"}


def test_own_pairs_in_words(smollm2):
    """Answers that begin alike are told apart at their first different token, which is put behind both texts."""
    given = [{"clean": "Three and four is", "corrupt": "Three and five is", "answer": " 17", "wrong": " 18"}]
    made = ContrastPairs.given(smollm2, given)
    decode = smollm2.text_tokenizer.decode
    assert decode(made.clean[0]) + decode(made.answers) == "Three and four is 17"
    assert decode(made.corrupt[0]) + decode(made.wrongs) == "Three and five is 18"
    with pytest.raises(DataError, match=r"position i of one text must be position i of the other"):
        ContrastPairs.given(smollm2, [{**given[0], "corrupt": "Three and five hundred and twelve is"}])
    with pytest.raises(DataError, match=r"begin an answer with its space"):
        ContrastPairs.given(smollm2, [{**given[0], "answer": " 17", "wrong": " 17"}])
    with pytest.raises(DataError, match=r"a pair is two texts and two answers"):
        ContrastPairs.given(smollm2, [("a", "b")])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda scope: ActivationPatching().run(scope), r"0 of \d+ first names are one token of its tokenizer"),
        (lambda scope: ActivationPatching(task="arithmetic").run(scope), r"task 'arithmetic' on .*its tokenizer does not fit"),
        (lambda scope: ActivationPatching(task="sums"), r"unknown task of probe 'activation_patching' 'sums'"),
        (lambda scope: ActivationPatching(at="x"), r"unknown at of probe"),
        (lambda scope: ActivationPatching(at="k", positions="last"), r"pass positions='all'"),
        (lambda scope: ActivationPatching(task="repeat", corruption="abc"), r"it is one of task 'ioi'"),
        (lambda scope: ActivationPatching(pairs=0), r"pairs=0"),
        (lambda scope: PathPatching(receivers=((1, 0),), at="k"), r"pass position='all'"),
        (lambda scope: PathPatching(task="repeat", receivers=((1, 9),)).run(scope), r"layer 1 has heads 0\.\.3"),
        (lambda scope: CircuitOverlap(top=2.0), r"top=2.0"),
        (lambda scope: CircuitOverlap(method="guess"), r"unknown method"),
        (lambda scope: CircuitOverlap(first="repeat", second="repeat").run(scope, ["x"]), r"it compares two tasks"),
        (lambda scope: ContrastPairs((torch.arange(4),), (torch.arange(5),), torch.tensor([1]), torch.tensor([2])), r"4 and 5 tokens"),
        (lambda scope: ContrastPairs((torch.arange(4),), (torch.arange(4),), torch.tensor([1]), torch.tensor([1])), r"one token"),
        (lambda scope: ContrastPairs((), (), torch.tensor([]), torch.tensor([])), r"at least one"),
    ],
)
def test_refusals(bundled, call, words):
    with pytest.raises(HeadscopeError, match=words):
        call(bundled)


def test_a_model_that_solves_nothing_is_said(scope, bundled):
    untrained = Scope(llama().float(), name="untrained")
    with pytest.raises(ProbeError, match=r"task 'ioi': untrained was scoped without a tokenizer"):
        ActivationPatching().run(untrained)
    made = repeat(bundled, 6, torch.Generator().manual_seed(0))
    swapped = ContrastPairs(made.clean, made.corrupt, made.wrongs, made.answers)
    with pytest.raises(ProbeError, match=r"it solves none of 6 pairs of given pairs, which .* after .* it says .* where .* was right"):
        ActivationPatching().run(bundled, swapped)
    wrong = ContrastPairs((torch.arange(8),), (torch.arange(8),), torch.tensor([3]), torch.tensor([4]))
    with pytest.raises(ProbeError, match=r"it solves none of 1 pairs .*: token \d+ where \d+ was right"):
        PathPatching().run(untrained, wrong)
    mostly = made.select([0, 1]), swapped.select([2, 3, 4, 5])
    both = ContrastPairs(
        mostly[0].clean + mostly[1].clean,
        mostly[0].corrupt + mostly[1].corrupt,
        torch.cat([mostly[0].answers, mostly[1].answers]),
        torch.cat([mostly[0].wrongs, mostly[1].wrongs]),
    )
    with pytest.raises(ProbeError, match=r"it solves 2 of 6 pairs"):
        LogitAttribution().run(bundled, both)
    assert LogitAttribution().run(bundled, both.select([0, 1, 2, 3])).numbers["pairs_solved"] == 2
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(ProbeError, match=r"looks both ways"):
        PathPatching(task="repeat").run(Scope(BertForMaskedLM(config).eval()))
