"""A hand-built model whose circuit is known: two heads that each look one token back, one feeding the other.

Layer 0, head 2 looks at the token before and writes it down as "the token before me is j". Layer 1,
head 1 looks at the token before and copies what was written there, so at each position the model knows
the token two before it, and the unembedding reads just that. The circuit of the winning logit is

    embedding of j at t-2  --L0.H2-->  feature j at t-1  --L1.H1-->  feature j at t  -->  logit j

The dictionaries have one feature per token and site, and three more that never matter.
"""

from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ingest.circuits import CircuitRequest, prompt_record
from ingest.prompts import Prompt
from ingest.roots import parse_root
from ingest.setup import set_up
from tests.ingest.models import BOS, attention_sae, transcoder

LETTERS = "ABCDEFGHIJ"
N_CTX, N_HEADS, D_HEAD, D_MODEL = 12, 4, 16, 64
TOKEN, MOVED, COPIED, POSITION = 0, 12, 24, 36  # where each subspace of the residual stream begins


def write_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(WordLevel({BOS: 0, **{letter: i + 1 for i, letter in enumerate(LETTERS)}}, unk_token=BOS))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS).save_pretrained(directory)


def write_planted(directory: Path, back: int = 1) -> Path:
    """The model in `directory`; the copying head looks `back` tokens back."""
    write_tokenizer(directory)
    config = GPT2Config(
        vocab_size=len(LETTERS) + 1,
        n_positions=N_CTX,
        n_embd=D_MODEL,
        n_layer=2,
        n_head=N_HEADS,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config)
    n_tokens = config.vocab_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.ones_like(parameter) if "ln_" in name and "weight" in name else 0 * parameter)
        model.transformer.wte.weight[:, TOKEN : TOKEN + n_tokens] = torch.eye(n_tokens)
        model.transformer.wpe.weight[:, POSITION : POSITION + N_CTX] = torch.eye(N_CTX)
        model.lm_head.weight[:, COPIED : COPIED + n_tokens] = torch.eye(n_tokens)
        for layer, head, read, write in ((0, 2, TOKEN, MOVED), (1, 1, MOVED, COPIED)):
            attn = model.transformer.h[layer].attn
            at = head * D_HEAD
            for t in range(N_CTX):
                attn.c_attn.weight[POSITION + t, at + t] = 30.0  # the query at t asks for
                asker = t + 1 if layer == 0 else t + back
                if asker < N_CTX:
                    attn.c_attn.weight[POSITION + t, D_MODEL + at + asker] = 30.0  # the key before it
            for j in range(n_tokens):
                attn.c_attn.weight[read + j, 2 * D_MODEL + at + j] = 1.0
                attn.c_proj.weight[at + j, write + j] = 1.0
    model.save_pretrained(directory)
    for layer, head in ((0, 2), (1, 1)):
        sae = attention_sae("relu", "attn.hook_z", layer, n_tokens + 3)
        sae.cfg.d_in = D_MODEL
        sae.cfg.apply_b_dec_to_input = False
        fill(sae, head * D_HEAD, n_tokens)
        sae.save_model(directory / "dictionaries" / f"{layer}.attn")
        mlp = transcoder("relu", layer, 4)
        mlp.cfg.d_in = mlp.cfg.d_out = D_MODEL
        for name in ("W_enc", "W_dec", "b_dec"):
            shape = {"W_enc": (D_MODEL, 4), "W_dec": (4, D_MODEL), "b_dec": (D_MODEL,)}[name]
            setattr(mlp, name, torch.nn.Parameter(torch.zeros(shape)))
        mlp.b_enc = torch.nn.Parameter(torch.full((4,), -1.0))
        mlp.save_model(directory / "dictionaries" / f"{layer}.mlp")
    return directory


def fill(sae, at: int, n_tokens: int) -> None:
    """Feature j reads and writes dimension `at + j` of z, with a threshold of a tenth."""
    W_enc = torch.zeros(D_MODEL, n_tokens + 3)
    W_enc[at : at + n_tokens, :n_tokens] = torch.eye(n_tokens)
    sae.W_enc = torch.nn.Parameter(W_enc)
    sae.W_dec = torch.nn.Parameter(W_enc.T.contiguous())
    sae.b_enc = torch.nn.Parameter(torch.full((n_tokens + 3,), -0.1))
    sae.b_dec = torch.nn.Parameter(torch.zeros(D_MODEL))


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return set_up(str(write_planted(tmp_path_factory.mktemp("planted") / "planted")))


@pytest.mark.parametrize(
    ("rule", "threshold"), [("relative", 0.05), ("support", 0.05), ("paper", 0.05), ("top_mass", 0.7)]
)
def test_the_planted_path_is_found(setup, rule, threshold):
    text = "CADBE"
    requests = [CircuitRequest(rule, threshold, parse_root("logits", setup.model, setup.dictionaries))]
    replacement = setup.replace(setup.model.tokens(text))
    record = prompt_record(Prompt(text, "test"), "p", setup.model, "r", replacement, requests)
    d, t = LETTERS.index("D") + 1, len(text)

    best = record.nodes[record.circuits[0].root]
    assert best.id == f"p/{t}/logit/{d}", "the model predicts the token two before"
    strongest = strongest_path(record, record.circuits[0].root)
    assert strongest == [
        (f"p/{t}/logit/{d}", None),
        (f"p/{t}/1/attn/{d}", None),
        (f"p/{t - 1}/0/attn/{d}", (1, 1)),
        (f"p/{t - 2}/embedding", (0, 2)),
    ]
    features = {record.nodes[i].id for i in record.circuits[0].members.tolist() if record.nodes[i].index is not None}
    assert features == {f"p/{t}/1/attn/{d}", f"p/{t - 1}/0/attn/{d}"}, "and nothing else is in the circuit"
    assert record.circuits[0].completeness > 0.9


def strongest_path(record, root):
    """From a root along the strongest incoming edges: [(node, (layer, head) that led there)]."""
    node, through = root, None
    path = [(record.nodes[root].id, None)]
    while record.nodes[node].index is not None or node == root:
        edges = [
            (weight, int(source), None)
            for source, target, weight in zip(
                record.direct.source, record.direct.target, record.direct.weight, strict=True
            )
            if target == node
        ]
        edges += [
            (weight, int(source), (int(layer), int(head)))
            for source, target, layer, head, weight in zip(
                record.ov.source, record.ov.target, record.ov.layer, record.ov.head, record.ov.weight, strict=True
            )
            if target == node
        ]
        _, node, through = max(edges, key=lambda edge: edge[0])
        path.append((record.nodes[node].id, through))
    return path
