"""What the graph is made of: labels with their keys and indexes, and the version of all that.

Every key label has a uniqueness constraint on `id`, which is also the index that finds a node; what
belongs to a prompt has an index on `prompt`. Neo4j also orders FEEDS by its number of prompts; the embedded engine
has no use for an index of relationships. The version stands in the database itself, in the node
(:Schema {id: 'atlas', version}), so that a program never touches a database of a newer one.
"""

from typing import LiteralString

import neo4j

from atlas import feeds
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
)
PROMPT_LABELS: tuple[LiteralString, ...] = ("Token", "Span", "CircuitNode", "AttentionScore", "Circuit")


def prepare(store: Store) -> None:
    """Create constraints and indexes and record the version, unless this version did so already.

    A store of version 1 has no FEEDS yet, and gets them from its edges; one of version 2 lacks indexes, and gets them.
    """
    version = check_version(store)
    if version == SCHEMA_VERSION:
        return
    store.write(_create_schema)
    if store.engine == "neo4j":
        store.change("CREATE INDEX feeds_n_prompts IF NOT EXISTS FOR ()-[r:FEEDS]-() ON (r.n_prompts)")
    if version == 1:
        feeds.rebuild(store)
    store.write(_record_version)


def _create_schema(transaction: neo4j.ManagedTransaction) -> None:
    for label in KEY_LABELS:
        name = label.lower()
        transaction.run(f"CREATE CONSTRAINT {name}_id IF NOT EXISTS FOR (n:{label}) REQUIRE n.id IS UNIQUE").consume()
    for label in PROMPT_LABELS:
        name = label.lower()
        transaction.run(f"CREATE INDEX {name}_prompt IF NOT EXISTS FOR (n:{label}) ON (n.prompt)").consume()
    transaction.run("CREATE INDEX prompt_task IF NOT EXISTS FOR (n:Prompt) ON (n.task)").consume()
    transaction.run("CREATE INDEX score_head IF NOT EXISTS FOR (n:AttentionScore) ON (n.layer, n.head)").consume()


def _record_version(transaction: neo4j.ManagedTransaction) -> None:
    transaction.run("MERGE (s:Schema {id: 'atlas'}) SET s.version = $version", {"version": SCHEMA_VERSION}).consume()
