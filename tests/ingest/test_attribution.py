"""The sweep and the edges against the identities of METHOD and against autograd on a model written plainly here.

The reference below is the frozen replacement model as a chain of ordinary tensor operations in
float64; its attributions and edges are derivatives that autograd takes. It shares no code with the
sweep: kept nodes pass gradient, pruned ones are detached.
"""

import threading
from collections import defaultdict
from dataclasses import dataclass, field

import pytest
import torch

from ingest import attribution, open_paths
from ingest.attribution import RULES, attribute
from ingest.circuits import CircuitRequest, prompt_record
from ingest.prompts import Prompt
from ingest.roots import Root, from_the_top, parse_root, root_table
from ingest.setup import set_up
from tests.ingest.models import write_random

TEXT = "The capital of Texas is"
KINDS = [
    ("relu", "attn.hook_z", "relu"),
    ("topk", "attn.hook_z", "jumprelu"),
    ("jumprelu", "attn.hook_z", "relu"),
    ("relu", "hook_attn_out", "jumprelu"),
    ("topk", "hook_attn_out", "relu"),
]
# With linear paths that stay open: which layers' attention has a dictionary is the last.
OPEN_KINDS = [
    ("none", "", "relu", ()),
    ("relu", "attn.hook_z", "jumprelu", (1,)),
    ("topk", "hook_attn_out", "skip", (0, 2)),
    ("relu", "attn.hook_z", "skip"),
    ("layer_norm", "hook_attn_out", "relu"),
    ("layer_norm", "hook_attn_out", "relu", (1, 2)),
]
THRESHOLDS = {"paper": 0.02, "relative": 0.05, "support": 0.05, "top_mass": 0.6}


@dataclass
class Frozen:
    """The frozen replacement model of one prompt, in plain operations.

    `kept[layer, site]` [pos, d_sae] says which features pass gradient. `probes[...]` are zeros added to
    activations and leaves: the derivative by a probe is the derivative by the node. `open_head` (layer, head)
    lets gradient through the values of one head only of a layer.
    """

    setup: object
    replacement: object
    kept: dict = field(default_factory=dict)
    probes: dict = field(default_factory=dict)
    open_head: tuple[int, int] | None = None

    def probe(self, key, like):
        self.probes[key] = torch.zeros_like(like, requires_grad=True)
        return self.probes[key]

    def dictionary(self, layer, site):
        return next(d for d in self.setup.dictionaries if (d.record.layer, d.record.site) == (layer, site))

    def is_closed(self, layer):
        return any((d.layer, d.site) == (layer, "attn") for d in self.setup.record.dictionaries)

    def scaled(self, x, d):
        """What an SAE that normalises its input encodes, its scale frozen."""
        if not d.layer_norm:
            return x
        frozen = self.replacement.trace.attn_out[d.record.layer]
        return (x - x.mean(1, keepdim=True)) / (frozen.std(1, keepdim=True) + 1e-5)

    def unscaled(self, x_hat, d):
        """Its output, the mean and the scale of its input frozen."""
        if not d.layer_norm:
            return x_hat
        frozen = self.replacement.trace.attn_out[d.record.layer]
        return x_hat * frozen.std(1, keepdim=True) + frozen.mean(1, keepdim=True)

    def encode(self, x, layer, site):
        """Pre-activations (differentiable) and activations whose pruned features are constants."""
        d = self.dictionary(layer, site)
        p = (self.scaled(x, d) - d.b_in) @ d.W_enc + d.b_enc
        a = p * d.active(p.detach())
        kept = self.kept.get((layer, site), torch.zeros_like(a, dtype=torch.bool))
        a = torch.where(kept, a, a.detach()) + self.probe((layer, site), a)
        return p, a

    def decode(self, a, x, truth, layer, site):
        d = self.dictionary(layer, site)
        skip = 0 if d.W_skip is None else x @ d.W_skip
        x_hat = self.unscaled(a @ d.W_dec + d.b_dec, d) + skip
        error = (truth - x_hat).detach() + self.probe((layer, site, "error"), truth)
        return x_hat + self.probe((layer, site, "bias"), truth) + error

    def run(self):
        """Pre-activations by (layer, site), and the logits."""
        t, w = self.replacement.trace, self.setup.model.weights
        pre = {}

        def normalise(x, sigma):
            return (x - x.mean(-1, keepdim=True)) / sigma[:, None]

        stream = t.embed + self.probe("embedding", t.embed) + t.pos_embed + self.probe("position", t.embed)
        for layer in range(len(t.pattern)):
            v = torch.einsum("sd,hde->she", normalise(stream, t.sigma_pre[layer]), w.W_V[layer]) + w.b_V[layer]
            if self.open_head is not None and self.open_head[0] == layer:
                shut = [h for h in range(v.shape[1]) if h != self.open_head[1]]
                v = torch.stack([v[:, h].detach() if h in shut else v[:, h] for h in range(v.shape[1])], 1)
            z = torch.einsum("hts,she->the", t.pattern[layer], v).flatten(1)
            if not self.is_closed(layer):
                self.encode(z, layer, "attn")
                z = z + self.probe((layer, "attn", "error"), z) + self.probe((layer, "attn", "bias"), z)
                out = z @ w.W_O[layer].flatten(0, 1) + w.b_O[layer] + self.probe((layer, "attn", "b_O"), stream)
            elif "hook_z" in self.dictionary(layer, "attn").record.hook_in:
                pre[layer, "attn"], a = self.encode(z, layer, "attn")
                z = self.decode(a, z, z.detach(), layer, "attn")
                out = z @ w.W_O[layer].flatten(0, 1) + w.b_O[layer] + self.probe((layer, "attn", "b_O"), stream)
            else:
                out = z @ w.W_O[layer].flatten(0, 1) + w.b_O[layer]
                pre[layer, "attn"], a = self.encode(out, layer, "attn")
                out = self.decode(a, out, out.detach(), layer, "attn")
            stream = stream + out
            x = normalise(stream, t.sigma_mid[layer])
            pre[layer, "mlp"], a = self.encode(x, layer, "mlp")
            stream = stream + self.decode(a, x, t.mlp_out[layer], layer, "mlp")
        logits = normalise(stream, t.sigma_final) @ w.W_U + w.b_U
        return pre, logits

    def target(self, root):
        pre, logits = self.run()
        if root.site != "logit":
            return pre[root.layer, root.site][root.position, root.index]
        value = logits[root.position, root.index]
        return value if root.versus is None else value - logits[root.position, root.versus]

    def gradients(self, root):
        """The derivative of the root by every probe."""
        value = self.target(root)
        keys = list(self.probes)
        grads = torch.autograd.grad(value, [self.probes[k] for k in keys], allow_unused=True, materialize_grads=True)
        return dict(zip(keys, grads, strict=True))


def dense(site, table):
    """Numbers of a site's active features as [pos, d_sae]."""
    out = torch.zeros(len(site.counts), site.dictionary.record.d_sae, dtype=torch.float64)
    out[site.position, site.index] = table.to(out.dtype)
    return out


def sites_downward(root, n_layers):
    order = [(layer, site) for layer in reversed(range(n_layers)) for site in ("mlp", "attn")]
    return order if root.site == "logit" else order[order.index((root.layer, root.site)) + 1 :]


def reference(setup, replacement, root, rule, threshold):
    """Attributions by autograd, site by site from the root down: (attr, kept) per site, leaves, probes' gradients."""
    frozen = Frozen(setup, replacement)
    root_value = frozen.target(root).detach()
    attrs = {}
    for key in sites_downward(root, len(replacement.mlp)):
        site = (replacement.mlp if key[1] == "mlp" else replacement.attn)[key[0]]
        attr = frozen.gradients(root)[key] * dense(site, site.value)
        attrs[key] = attr
        frozen.kept[key] = plain_rule(rule, threshold, attr, root_value)
    return attrs, frozen.kept, frozen.gradients(root), root_value


def plain_rule(rule, threshold, attr, root_value):
    if rule == "paper":
        return attr > threshold
    if rule == "relative":
        return (attr.abs() >= threshold * root_value.abs()) & (attr != 0)
    if rule == "support":
        return (attr != 0) & (attr / root_value >= threshold)
    kept = torch.zeros_like(attr, dtype=torch.bool)
    total, mass = attr.abs().sum(), 0.0
    cells = sorted(attr.nonzero().tolist(), key=lambda cell: -abs(attr[cell[0], cell[1]]))
    for t, j in cells:
        if mass >= threshold * total:
            break
        kept[t, j] = True
        mass += abs(attr[t, j])
    return kept


def some_roots(replacement):
    """Logits, a difference, and the strongest feature of every site above the first layer."""
    last = len(replacement.trace.tokens) - 1
    n_layers = len(replacement.mlp)
    roots = [Root("logit", n_layers, last, 7), Root("logit", n_layers, last - 1, 30, versus=11)]
    for layer in range(n_layers):
        for site, name in ((replacement.attn[layer], "attn"), (replacement.mlp[layer], "mlp")):
            if site.dictionary.is_open:
                continue
            strongest = int((site.value * (site.position == last)).argmax())
            roots.append(Root(name, layer, last, int(site.index[strongest])))
    return from_the_top(roots)


@pytest.fixture(scope="module", params=KINDS + OPEN_KINDS, ids=lambda kinds: "-".join(map(str, kinds)))
def setup(request, tmp_path_factory):
    return set_up(str(write_random(tmp_path_factory.mktemp("model"), *request.param)), torch.float64)


@pytest.fixture(scope="module")
def replacement(setup):
    return setup.replace(setup.model.tokens(TEXT))


@pytest.mark.parametrize("rule", RULES)
def test_every_attribution_equals_autograd(setup, replacement, rule):
    roots = some_roots(replacement)
    table = root_table(roots, replacement)
    found = attribute(replacement, table, RULES[rule](THRESHOLDS[rule]))
    n_kept = n_pruned = 0
    for r, root in enumerate(roots):
        attrs, kept, grads, root_value = reference(setup, replacement, root, rule, THRESHOLDS[rule])
        assert table.value[r] == pytest.approx(float(root_value), rel=1e-9)
        for (layer, name), attr in attrs.items():
            site = (replacement.mlp if name == "mlp" else replacement.attn)[layer]
            ours = (found.mlp if name == "mlp" else found.attn)[layer]
            torch.testing.assert_close(dense(site, ours.feature[r]), attr, rtol=1e-9, atol=1e-12)
            assert torch.equal(dense(site, ours.kept[r]).bool(), kept[layer, name])
            n_kept, n_pruned = n_kept + int(kept[layer, name].sum()), n_pruned + int((~kept[layer, name]).sum())
            error = (grads[layer, name, "error"] * site.error).sum(1)
            torch.testing.assert_close(ours.error[r], error, rtol=1e-9, atol=1e-12)
            bias = (grads[layer, name, "bias"] * site.bias).sum(1)
            if (layer, name, "b_O") in grads:
                bias = bias + (grads[layer, name, "b_O"] * setup.model.weights.b_O[layer]).sum(1)
            torch.testing.assert_close(ours.bias[r], bias, rtol=1e-9, atol=1e-12)
        trace = replacement.trace
        torch.testing.assert_close(found.embedding[r], (grads["embedding"] * trace.embed).sum(1), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            found.position[r], (grads["position"] * trace.pos_embed).sum(1), rtol=1e-9, atol=1e-12
        )
    assert n_kept > 20
    assert n_pruned > 20


@pytest.mark.parametrize("rule", RULES)
def test_flow_is_conserved(replacement, rule):
    """I2: the root's value is its leaves, what was pruned, and the constants."""
    table = root_table(some_roots(replacement), replacement)
    found = attribute(replacement, table, RULES[rule](THRESHOLDS[rule]))
    total = found.embeddings + found.biases + found.errors + found.pruned + found.constant
    torch.testing.assert_close(total, table.value, rtol=1e-9, atol=1e-9)


def test_few_and_many_reads_look_back_to_the_same(replacement, monkeypatch):
    table = root_table(some_roots(replacement), replacement)
    found = []
    for dense in (0, 10**9):
        monkeypatch.setattr(attribution, "DENSE", dense)
        found.append(attribute(replacement, table, RULES["support"](THRESHOLDS["support"])))
    few, many = found
    assert few.embedding.abs().max() > 1e-3
    for name in ("embedding", "position", "constant", "pruned"):
        torch.testing.assert_close(getattr(many, name), getattr(few, name), rtol=1e-9, atol=1e-12)


def everything(setup, replacement, monkeypatch):
    """A record in which every node and every edge of the prompt is stored."""
    monkeypatch.setattr("ingest.edges.SHARE", 0.0)
    specs = ["logits", "features"]
    requests = [CircuitRequest("paper", -1e30, parse_root(s, setup.model, setup.dictionaries)) for s in specs]
    return prompt_record(Prompt(TEXT, "test"), "p", setup.model, "r", replacement, requests)


def incoming(record):
    total = dict.fromkeys(range(len(record.nodes)), 0.0)
    for edges in (record.direct, record.ov):
        for target, weight in zip(edges.target.tolist(), edges.weight.tolist(), strict=True):
            total[target] += weight
    return total


def edges_of(record):
    """Weights by source, target and head."""
    edges = {}
    for s, t, w in zip(record.direct.source, record.direct.target, record.direct.weight, strict=True):
        edges[int(s), int(t), None] = w
    for s, t, h, w in zip(record.ov.source, record.ov.target, record.ov.head, record.ov.weight, strict=True):
        edges[int(s), int(t), int(h)] = w
    assert len(edges) == len(record.direct.weight) + len(record.ov.weight), "none is doubled"
    return edges


def test_direct_edges_sum_to_the_pre_activation(setup, replacement, monkeypatch):
    """I1: all edges from all upstream nodes, plus the constant, are the pre-activation."""
    record = everything(setup, replacement, monkeypatch)
    total = incoming(record)
    checked = 0
    for number, node in enumerate(record.nodes):
        if node.pre_activation is None:
            continue
        scale = max(abs(node.pre_activation), 1e-3)
        assert abs(total[number] + node.constant - node.pre_activation) <= 1e-9 * scale, node.id
        assert abs(node.unstored) <= 1e-9 * scale
        checked += 1
    assert checked > 100


def test_every_edge_equals_autograd(setup, replacement, monkeypatch):
    """DIRECT edges and OV edges per head, against derivatives of the target with everything else detached."""
    record = everything(setup, replacement, monkeypatch)
    edges = edges_of(record)
    targets = [n for n, node in enumerate(record.nodes) if node.pre_activation is not None][::7]
    compared = 0
    for t in targets:
        node = record.nodes[t]
        heads = range(setup.model.record.n_heads) if node.kind == "Attn" else [None]
        for head in heads:
            frozen = Frozen(setup, replacement, open_head=head if head is None else (node.layer, head))
            index = int(node.id.rpartition("/")[2])
            site = "logit" if node.kind == "Logit" else node.site
            grads = frozen.gradients(Root(site, node.layer, node.position, index))
            for s, source in enumerate(record.nodes):
                want = float(derivative(source, grads, replacement, setup))
                assert edges.get((s, t, head), 0.0) == pytest.approx(want, rel=1e-9, abs=1e-12), (source.id, node.id)
                compared += want != 0
    assert compared > 500


def derivative(node, grads, replacement, setup):
    """a_u times the derivative by node u, from the probes' gradients."""
    t, trace = node.position, replacement.trace
    if node.kind == "Logit" or node.site in ("q", "k"):
        return 0.0
    if node.kind == "Embedding":
        return grads["embedding"][t] @ trace.embed[t]
    if node.kind == "PositionEmbedding":
        return grads["position"][t] @ trace.pos_embed[t]
    site = (replacement.mlp if node.site == "mlp" else replacement.attn)[node.layer]
    if node.kind in ("MLP", "Attn"):
        return grads[node.layer, node.site][t, node.index] * node.value
    if node.kind == "Error":
        return grads[node.layer, node.site, "error"][t] @ site.error[t]
    value = grads[node.layer, node.site, "bias"][t] @ site.bias[t]
    if (node.layer, node.site, "b_O") in grads:
        value = value + grads[node.layer, node.site, "b_O"][t] @ setup.model.weights.b_O[node.layer]
    return value


@pytest.mark.parametrize("kinds", [kinds for kinds in OPEN_KINDS if len(kinds) == 4 or "skip" in kinds])
def test_a_long_prompt_in_blocks_of_several_threads_gives_the_same_edges(tmp_path, monkeypatch, kinds):
    setup = set_up(str(write_random(tmp_path / "little", *kinds)), torch.float64)
    replacement = setup.replace(setup.model.tokens(TEXT))
    threads, found, per_block = torch.get_num_threads(), [], []
    strong = open_paths._strong
    monkeypatch.setattr(open_paths, "_strong", lambda *args: per_block.append(threading.get_ident()) or strong(*args))
    try:
        for block, n, low in ((10**6, 1, 10**6), (7, 3, 0)):
            monkeypatch.setattr(open_paths, "BLOCK", block)
            monkeypatch.setattr(open_paths, "LOW", low)
            torch.set_num_threads(n)
            found.append(everything(setup, replacement, monkeypatch))
            assert torch.get_num_threads() == n, "it is left as it was"
    finally:
        torch.set_num_threads(threads)
    assert len(per_block) > 20
    assert threading.get_ident() in per_block
    assert len(set(per_block)) > 1
    one, many = (edges_of(record) for record in found)
    assert one.keys() == many.keys()
    assert many == pytest.approx(one, rel=1e-9, abs=1e-12)


def test_ablating_a_node_moves_the_target_by_its_edge(setup, replacement, monkeypatch):
    """In the frozen model, taking a feature away changes a target by exactly the stored edge, sum over heads."""
    record = everything(setup, replacement, monkeypatch)
    stored: dict[tuple[int, int], float] = defaultdict(float)
    for edges in (record.direct, record.ov):
        for s, t, weight in zip(edges.source.tolist(), edges.target.tolist(), edges.weight.tolist(), strict=True):
            if record.nodes[s].kind in ("MLP", "Attn") and record.nodes[t].kind != "Logit":
                stored[s, t] += weight
    strongest = sorted(stored, key=lambda pair: -abs(stored[pair]))[:20]
    assert len(strongest) == 20
    for s, t in strongest:
        source, target = record.nodes[s], record.nodes[t]
        clean = ablated_pre_activation(setup, replacement, None, target)
        change = ablated_pre_activation(setup, replacement, source, target) - clean
        assert change == pytest.approx(-stored[s, t], rel=1e-9, abs=1e-12)


def ablated_pre_activation(setup, replacement, source, target):
    """The target's pre-activation when only `source` is taken out, every other node's value held."""

    class Ablated(Frozen):
        def encode(self, x, layer, site):
            d = self.dictionary(layer, site)
            p = (self.scaled(x, d) - d.b_in) @ d.W_enc + d.b_enc
            held = (self.replacement.mlp if site == "mlp" else self.replacement.attn)[layer]
            a = dense(held, held.value)
            if source is not None and (layer, site) == (source.layer, source.site):
                a = a.clone()
                a[source.position, source.index] = 0
            self.probe((layer, site), a)
            return p, a

        def decode(self, a, x, truth, layer, site):
            held = (self.replacement.mlp if site == "mlp" else self.replacement.attn)[layer]
            d = self.dictionary(layer, site)
            skip = 0 if d.W_skip is None else x @ d.W_skip
            return self.unscaled(a @ d.W_dec + d.b_dec, d) + held.error + skip

    pre, _ = Ablated(setup, replacement).run()
    return float(pre[target.layer, target.site][target.position, target.index].detach())


def test_replacement_with_its_errors_is_the_real_model(setup, replacement):
    """Sum every node's write, layer by layer: the same residual stream, the same logits."""
    frozen = Frozen(setup, replacement)
    _, logits = frozen.run()
    torch.testing.assert_close(logits, replacement.trace.logits, rtol=0, atol=1e-9)
    with torch.no_grad():
        real = setup.model.bridge(replacement.trace.tokens[None])[0]
    torch.testing.assert_close(logits, real, rtol=0, atol=1e-9)
