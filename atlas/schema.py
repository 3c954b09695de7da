"""What the graph is made of: labels with their keys and indexes, and the version of all that.

Every key label has a uniqueness constraint on `id`, which is also the index that finds a node; what
belongs to a prompt has an index on `prompt`. The embedded engine finds relationships by an index only where a MATCH
begins a query or a CALL () {}, names no label, and asks for equality or IN: hence FEEDS.log2_prompts, a few values
by which the most common are found. The version stands in the database itself, in the node
(:Schema {id: 'atlas', version}), so that a program never touches a database of a newer one.
"""

from typing import LiteralString

import neo4j

from atlas import feeds, taskparts
from atlas.records import SCHEMA_VERSION
from atlas.store import Store, check_version

KEY_LABELS: tuple[LiteralString, ...] = (
    "Schema",
    "Model",
    "Dictionary",
    "ReplacementModel",
    "Run",
    "Feature",
    "Prompt",
    "Token",
    "Span",
    "CircuitNode",
    "AttentionScore",
    "Circuit",
    "TaskPart",
)
PROMPT_LABELS: tuple[LiteralString, ...] = ("Token", "Span", "CircuitNode", "AttentionScore", "Circuit")
# Name, relationship and properties of the indexes of relationships.
RELATIONSHIP_INDEXES: tuple[tuple[LiteralString, LiteralString, LiteralString], ...] = (
    ("feeds_log2_prompts", "FEEDS", "r.log2_prompts"),
    ("feeds_head", "FEEDS", "r.layer, r.head"),
    ("wire_rank", "VIRTUAL_WEIGHT", "r.rank"),
)


def prepare(store: Store) -> None:
    """Create constraints and indexes and record the version, unless this version did so already.

    A store of version 1 has no FEEDS yet, and gets them from its edges; one of version 2 lacks indexes, and gets them;
    one of version 3 lacks the numbers of prompts that features and FEEDS have, and gets them; one of version 4 has no
    TaskPart yet, and gets them from its circuits.
    """
    version = check_version(store)
    if version == SCHEMA_VERSION:
        return
    store.write(_create_schema)
    if version == 1:
        feeds.rebuild(store)
    if version is not None and version < 4:
        feeds.count_prompts(store)
    if version is not None:
        taskparts.rebuild(store)
    store.write(_record_version)


def _create_schema(transaction: neo4j.ManagedTransaction) -> None:
    for label in KEY_LABELS:
        name = label.lower()
        transaction.run(f"CREATE CONSTRAINT {name}_id IF NOT EXISTS FOR (n:{label}) REQUIRE n.id IS UNIQUE").consume()
    for label in PROMPT_LABELS:
        name = label.lower()
        transaction.run(f"CREATE INDEX {name}_prompt IF NOT EXISTS FOR (n:{label}) ON (n.prompt)").consume()
    transaction.run("CREATE INDEX prompt_task IF NOT EXISTS FOR (n:Prompt) ON (n.task)").consume()
    for name in ("log2_circuits", "log2_share"):
        transaction.run(f"CREATE INDEX {name} IF NOT EXISTS FOR (n:TaskPart) ON (n.task, n.{name})").consume()
    for name, relationship, properties in RELATIONSHIP_INDEXES:
        transaction.run(f"CREATE INDEX {name} IF NOT EXISTS FOR ()-[r:{relationship}]-() ON ({properties})").consume()
    transaction.run("CREATE INDEX score_head IF NOT EXISTS FOR (n:AttentionScore) ON (n.layer, n.head)").consume()


def _record_version(transaction: neo4j.ManagedTransaction) -> None:
    transaction.run("MERGE (s:Schema {id: 'atlas'}) SET s.version = $version", {"version": SCHEMA_VERSION}).consume()
