"""The data that passes from ingestion to the graph: one frozen dataclass per thing that is stored.

A `PromptRecord` is everything one prompt contributes, and is written in one transaction.
Nodes are listed once, in `nodes`; edges and circuits refer to them by their place in that list.
SCHEMA names what is stored, METHOD says what the numbers mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SCHEMA_VERSION = 5


class Kind(StrEnum):
    """The kinds of circuit nodes, by the label that each carries besides CircuitNode."""

    MLP = "MLP"
    ATTN = "Attn"
    EMBEDDING = "Embedding"
    POSITION = "PositionEmbedding"
    ERROR = "Error"
    BIAS = "Bias"
    LOGIT = "Logit"


@dataclass(frozen=True)
class ModelRecord:
    """A language model; `revision` is the sha256 of its weights or a hub's commit."""

    id: str
    architecture: str
    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    n_ctx: int
    d_vocab: int
    revision: str
    weight_processing: str


@dataclass(frozen=True)
class DictionaryRecord:
    """A sparse dictionary at one site of one layer: `site` is attn or mlp, `kind` sae or transcoder.

    What was measured of it is None where it was not: see ingest/quality.py.
    """

    id: str
    layer: int
    site: str
    kind: str
    activation: str
    hook_in: str
    hook_out: str
    d_in: int
    d_sae: int
    source: str
    revision: str
    sha256: str
    explained_variance: float | None = None
    l0: float | None = None
    loss_kept: float | None = None
    error_share: float | None = None
    measured_on: str | None = None


@dataclass(frozen=True)
class ReplacementModelRecord:
    """A model and the dictionaries that stand in for its layers; `id` hashes all of them.

    `open_attention` are the layers whose attention has none, ascending: there it passes through its patterns.
    `dtype` is what the model computed in: bfloat16, float32 or float64.
    """

    id: str
    name: str
    model: ModelRecord
    dictionaries: tuple[DictionaryRecord, ...]
    open_attention: tuple[int, ...] = ()
    dtype: str = "float32"


@dataclass(frozen=True)
class RunRecord:
    """One call of `atlas ingest`: its configuration as JSON and when it began (ISO 8601, UTC)."""

    id: str
    config: str
    started_at: str
    atlas_version: str


@dataclass(frozen=True)
class Firings:
    """Where features are active in a prompt, feature by feature, in columns, as there are thousands.

    Feature i is `index[i]` of the dictionary with the id `dictionaries[dictionary[i]]`. It fires at
    `position[start[i] : start[i + 1]]`, ascending, with the activations `value` of the same places. Shapes:
    `dictionary` and `index` [feature], `start` [feature + 1], `position` and `value` [firing].
    """

    dictionaries: tuple[str, ...]
    dictionary: NDArray[np.int64]
    index: NDArray[np.int64]
    start: NDArray[np.int64]
    position: NDArray[np.int64]
    value: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def features(self) -> list[tuple[str, int]]:
        """(dictionary, index) of every feature."""
        return [(self.dictionaries[d], i) for d, i in zip(self.dictionary.tolist(), self.index.tolist(), strict=True)]


@dataclass(frozen=True)
class Spans:
    """Features active on two or more consecutive tokens, in columns: all [span].

    `feature` is the feature's place in the prompt's Firings; it fires on the tokens `start` to `end`, whose text
    is `text`, with the mean activation `mean`.
    """

    feature: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    text: tuple[str, ...]
    mean: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.feature)


class NodeRecord(NamedTuple):
    """One node of a prompt's attribution graphs; what does not apply to its kind is None.

    `layer` is -1 for embeddings and n_layers for logits. Features have dictionary, index,
    value, pre_activation, constant and unstored; embeddings token_id; errors norm;
    logits token (text), logit, probability, pre_activation, constant and unstored, and `versus`
    (text) where the root is a difference of two tokens; their logit and probability are then differences.
    A tuple, as there are a thousand in a prompt.
    """

    id: str
    kind: Kind
    position: int
    layer: int
    name: str
    dictionary: str | None = None
    index: int | None = None  # pyright: ignore[reportIncompatibleMethodOverride]
    site: str | None = None
    value: float | None = None
    pre_activation: float | None = None
    constant: float | None = None
    unstored: float | None = None
    token_id: int | None = None
    norm: float | None = None
    token: str | None = None
    versus: str | None = None
    logit: float | None = None
    probability: float | None = None


@dataclass(frozen=True)
class DirectEdges:
    """DIRECT edges: `source` and `target` [n_edges] index the prompt's nodes, `weight` [n_edges]."""

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    weight: NDArray[np.float64]


@dataclass(frozen=True)
class OVEdges:
    """OV edges, one per head: all arrays [n_edges]; `source` and `target` index the prompt's nodes."""

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    layer: NDArray[np.int64]
    head: NDArray[np.int64]
    weight: NDArray[np.float64]
    pattern: NDArray[np.float64]


@dataclass(frozen=True)
class AttentionScores:
    """Scores of heads that were taken apart: all arrays [n_scores], each (layer, head, query, key) once.

    `score` is before the softmax, `pattern` after it; `unstored` is the part of the score that no QK edge carries.
    """

    layer: NDArray[np.int64]
    head: NDArray[np.int64]
    query: NDArray[np.int64]
    key: NDArray[np.int64]
    score: NDArray[np.float64]
    pattern: NDArray[np.float64]
    unstored: NDArray[np.float64]

    @classmethod
    def none(cls) -> "AttentionScores":
        """No scores."""
        whole, real = np.zeros(0, dtype=np.int64), np.zeros(0)
        return cls(whole, whole, whole, whole, real, real, real)


@dataclass(frozen=True)
class QKEdges:
    """QK edges, one per head: all arrays [n_edges]; `source` (at the key) and `target` (at the query) index nodes.

    Each belongs to the AttentionScore of its layer, head, and its nodes' positions.
    """

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    layer: NDArray[np.int64]
    head: NDArray[np.int64]
    score: NDArray[np.float64]
    lift: NDArray[np.float64]

    @classmethod
    def none(cls) -> "QKEdges":
        """No edges."""
        whole, real = np.zeros(0, dtype=np.int64), np.zeros(0)
        return cls(whole, whole, whole, whole, real, real)


@dataclass(frozen=True)
class SharesRecord:
    """What interventions in the real model said of a circuit and of two baselines of its size (METHOD 6).

    All are shares of the root's value; `ablation` is what features were set to: mean, zero or resample.
    """

    ablation: str
    faithfulness: float
    necessity: float
    random_faithfulness: float
    random_necessity: float
    top_faithfulness: float
    top_necessity: float


@dataclass(frozen=True)
class CircuitRecord:
    """One root's circuit under one rule.

    `root` indexes the prompt's nodes, `members` [n_nodes] too (the root among them), with their
    `attribution` [n_nodes] to the root. `n_edges` counts the stored edges between members.
    completeness + error_share + pruned_share = 1 (METHOD 4). `shares` is None where nothing was measured.
    """

    id: str
    root: int
    rule: str
    threshold: float
    members: NDArray[np.int64]
    attribution: NDArray[np.float64]
    n_edges: int
    root_value: float
    completeness: float
    error_share: float
    pruned_share: float
    shares: SharesRecord | None = None


@dataclass(frozen=True)
class MultiTokenRecord:
    """A multi-token circuit (METHOD 8): a span (one feature) or a chain (one feature a token), from `start` to `end`.

    `joins` are the ids of the stored circuits of its roots, in the tokens' order. What is None was not
    measured: a null without a draw has no mean, and a first token without a feature nothing to ablate.
    """

    id: str
    prompt: str
    form: str
    start: int
    end: int
    text: str
    joins: tuple[str, ...]
    crossing_weight: float
    crossing_leaves: float
    null_n: int
    shuffled_n: int
    p_value: float
    q_value: float
    null_mean: float | None = None
    null_sd: float | None = None
    shuffled_mean: float | None = None
    ablated_to: str | None = None
    n_ablated: int | None = None
    lost: float | None = None
    lost_random: float | None = None


@dataclass(frozen=True)
class PromptRecord:
    """Everything that one prompt contributes to the graph; written in one transaction.

    `requests` says which circuits were asked for, as JSON strings that the ingestion compares on a
    later run. `fields` are the input row's other fields, kept as they came.
    """

    id: str
    replacement_model: str
    text: str
    token_ids: tuple[int, ...]
    token_texts: tuple[str, ...]
    requests: tuple[str, ...]
    firings: Firings
    spans: Spans
    nodes: tuple[NodeRecord, ...]
    direct: DirectEdges
    ov: OVEdges
    circuits: tuple[CircuitRecord, ...]
    task: str | None = None
    source: str | None = None
    fields: Mapping[str, object] = field(default_factory=dict[str, object])
    scores: AttentionScores = field(default_factory=AttentionScores.none)
    qk: QKEdges = field(default_factory=QKEdges.none)
