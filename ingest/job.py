"""An ingestion job: prompts in, one transaction each, resumable.

text -> tokens -> trace -> active features -> replacement model -> circuits -> records -> transaction.
What is stored already is not computed again: a prompt keeps the list of circuits that were asked for,
and is replaced, with the earlier requests and the new ones, only where something new is asked. Its task
is the last that it was given with. One thread writes while the next prompt is computed.
"""

import hashlib
import json
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import atlas
from atlas.errors import AtlasError
from atlas.faithfulness import stored_shares
from atlas.records import CircuitRecord, PromptRecord, RunRecord, SharesRecord
from atlas.runs import end_lost
from atlas.schema import prepare
from atlas.store import Store
from atlas.writer import Asked, asked_before, finish_run, register, set_task, write_prompt
from ingest.circuits import CircuitRequest, prompt_record
from ingest.faithfulness import Ablation, measured
from ingest.graph import LOOK_SHARE
from ingest.prompts import Complain, Prompt
from ingest.roots import parse_root
from ingest.setup import Setup

AHEAD = 2  # prompts computed and waiting for the writer


@dataclass(frozen=True)
class Task:
    """A prompt that is ready to be traced; `requests` are asked of it besides those of the run."""

    prompt: Prompt
    id: str
    tokens: list[int]
    requests: Sequence[CircuitRequest] = ()


@dataclass
class Summary:
    """What a job did: `prompts` with their circuits and edges once they are written."""

    prompts: int = 0
    skipped: int = 0
    refused: int = 0
    circuits: int = 0
    edges: int = 0


def prepare_tasks(setup: Setup, prompts: Iterable[Prompt], truncate: bool, complain: Complain) -> list[Task]:
    """Tokenize; prompts that are empty or too long go to `complain`, each prompt is taken once, with its last task."""
    tasks: dict[str, Task] = {}
    n_ctx = setup.model.record.n_ctx
    for prompt in prompts:
        tokens = setup.model.tokens(prompt.text) if prompt.text.strip() else []
        if len(tokens) < 2:
            complain(f"{prompt.where} is an empty prompt")
            continue
        if len(tokens) > n_ctx and not truncate:
            complain(
                f"{prompt.where} has {len(tokens)} tokens, but {setup.model.record.id} reads at most {n_ctx}; "
                "shorten it or give --truncate"
            )
            continue
        if len(tokens) > n_ctx:
            tokens = tokens[:n_ctx]
            prompt = replace(prompt, text=setup.model.text(tokens[1:]))
        id = prompt_id(setup, tokens)
        if id not in tasks or prompt.task is not None:
            tasks[id] = Task(prompt, id, tokens)
    return list(tasks.values())


def circuit_requests(
    setup: Setup,
    specs: Sequence[str],
    rule: str,
    threshold: float,
    look_share: float | None = None,
    logit_threshold: float | None = None,
) -> list[CircuitRequest]:
    """The requests of this run; without `look_share`, that of the stored prompt stays, and without
    `logit_threshold`, logits have no other than features. Raises AtlasError for a root that cannot be."""
    roots = [parse_root(spec, setup.model, setup.dictionaries) for spec in specs]
    return [CircuitRequest(rule, threshold, root, look_share, logit_threshold) for root in roots]


def run(
    store: Store,
    setup: Setup,
    tasks: Sequence[Task],
    requests: Sequence[CircuitRequest],
    complain: Complain,
    progress: Callable[[Summary], None],
    until: float = math.inf,
    by: Ablation | None = None,
) -> Summary:
    """Ingest `tasks`, calling `progress` after each and at the end; a KeyboardInterrupt leaves whole prompts only.

    No task is begun after `until` (time.monotonic()). With `by`, circuits are measured in the real model (METHOD 6).
    """
    summary = Summary()
    config = json.dumps({"model": setup.record.name, "requests": [request.stored for request in requests]})
    run_id = str(uuid.uuid4())
    prepare(store)
    end_lost(store)
    register(store, setup.record, RunRecord(run_id, config, datetime.now(UTC).isoformat(), atlas.__version__))
    stored = asked_before(store, [task.id for task in tasks])
    status = "failed"
    writer = _Writer(store, run_id, summary)
    try:
        try:
            for task in tasks:
                if time.monotonic() >= until:
                    break
                _ingest(writer, setup, task, stored.get(task.id), requests, complain, summary, by)
                progress(summary)
        finally:
            writer.finish()
        progress(summary)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        finish_run(store, run_id, status)
    return summary


def _ingest(
    writer: "_Writer",
    setup: Setup,
    task: Task,
    stored: Asked | None,
    requests: Sequence[CircuitRequest],
    complain: Complain,
    summary: Summary,
    by: Ablation | None,
) -> None:
    prompt, earlier = task.prompt, stored.requests if stored else ()
    if stored and prompt.task is None:
        prompt = replace(prompt, task=stored.task)
    wanted = _merge(setup, earlier, [*requests, *task.requests])
    if stored and {request.stored for request in wanted} == set(earlier):
        if prompt.task is not None and prompt.task != stored.task:
            set_task(writer.store, task.id, prompt.task)
        summary.skipped += 1
        return
    replacement = setup.replace(task.tokens)
    record = prompt_record(prompt, task.id, setup.model, setup.record.id, replacement, wanted)
    if not record.circuits:
        summary.refused += 1
        complain(f"{task.prompt.where}: none of the roots asked for is active in this prompt")
        return
    if stored:
        record = _with_shares(record, stored_shares(writer.store, task.id))
    if by:
        record = measured(setup, replacement, record, by)
    writer.put(record)


def _with_shares(record: PromptRecord, shares: Mapping[str, tuple[float, SharesRecord]]) -> PromptRecord:
    """The record with what was measured of the same circuits earlier, so that replacing a prompt loses nothing."""

    def earlier(circuit: CircuitRecord) -> SharesRecord | None:
        threshold, found = shares.get(circuit.id, (None, None))
        return found if threshold == circuit.threshold else None

    return replace(record, circuits=tuple(replace(circuit, shares=earlier(circuit)) for circuit in record.circuits))


def _merge(setup: Setup, stored: Sequence[str], requests: Sequence[CircuitRequest]) -> list[CircuitRequest]:
    """What is stored and what is asked; of two thresholds for one root and rule, the one asked now.

    A prompt has one look share: the one asked now, or the stored one, or `LOOK_SHARE`.
    """
    merged: dict[tuple[str, str], CircuitRequest] = {}
    for row in map(json.loads, stored):
        root = parse_root(row["root"], setup.model, setup.dictionaries)
        merged[row["root"], row["rule"]] = CircuitRequest(
            row["rule"], row["threshold"], root, row.get("look_share"), row.get("logit_threshold")
        )
    earlier = [request.look_share for request in merged.values()]
    for request in requests:
        merged.pop((request.root.spec, request.rule), None)
        merged[request.root.spec, request.rule] = request
    asked = [request.look_share for request in requests]
    look_share = next((share for share in (*asked, *earlier) if share is not None), LOOK_SHARE)
    return [replace(request, look_share=look_share) for request in merged.values()]


def prompt_id(setup: Setup, tokens: list[int]) -> str:
    """A prompt's id: a hash of the replacement model and the token ids."""
    text = f"{setup.record.id}:{','.join(map(str, tokens))}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Writer:
    """Writes prompts in a thread of its own, each in one transaction, in the order they come, and counts them."""

    def __init__(self, store: Store, run_id: str, summary: Summary) -> None:
        self.store, self._run_id, self._summary = store, run_id, summary
        self._waiting: queue.Queue[PromptRecord | None] = queue.Queue(AHEAD)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="atlas-writer")
        self._thread.start()

    def put(self, record: PromptRecord) -> None:
        """Hand over a prompt; raises what an earlier write raised."""
        self._waiting.put(record)
        self._check()

    def finish(self) -> None:
        """Write what is waiting and stop; raises what a write raised."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()
        self._check()

    def _check(self) -> None:
        if self._error:
            error, self._error = self._error, None
            raise AtlasError(f"The store stopped taking prompts: {error}") from error

    def _work(self) -> None:
        while record := self._waiting.get():
            if self._error:
                continue
            try:
                write_prompt(self.store, record, self._run_id)
                self._summary.prompts += 1
                self._summary.circuits += len(record.circuits)
                self._summary.edges += len(record.direct.weight) + len(record.ov.weight)
            except BaseException as error:
                self._error = error
