"""What was measured of dictionaries: noted in the store, kept over later runs, and called bad where it is."""

from dataclasses import replace

import pytest

from atlas.quality import faults
from atlas.store import Store
from atlas.writer import record_quality, register
from queries.summary import summary
from tests.synthetic import synthetic_model, synthetic_run

ASK = "MATCH (d:Dictionary {id: $id}) RETURN d.explained_variance AS ev, d.loss_kept AS kept, d.measured_on AS text"


def test_figures_are_noted_on_the_same_weights_and_stay(store: Store) -> None:
    model = synthetic_model()
    plain = [replace(d, explained_variance=None, l0=None) for d in model.dictionaries]
    model = replace(model, dictionaries=tuple(plain))
    register(store, model, synthetic_run())
    measured = replace(plain[0], explained_variance=-7.5, l0=19.0, loss_kept=0.9, error_share=0.3, measured_on="a text")
    foreign = replace(plain[1], sha256="other weights", explained_variance=0.9)
    assert record_quality(store, [measured, foreign]) == 1
    register(store, model, synthetic_run())
    assert store.read(ASK, id=plain[0].id).iloc[0].tolist() == [-7.5, 0.9, "a text"]
    assert store.read(ASK, id=plain[1].id)["ev"].isna().all()

    rows = summary(store)
    said = dict(zip(rows["what"], rows["value"], strict=True))
    assert said["bad dictionary"] == f"{plain[0].id}: explained variance -7.50"
    assert said[f"{plain[0].site} quality"] == (
        "explained variance -7.50 to -7.50, L0 19.00 to 19.00, loss kept 0.90 to 0.90, share of error 0.30 to 0.30"
    )
    other = {"attn": "mlp", "mlp": "attn"}[plain[0].site]
    assert said[f"{other} quality"] == "not measured: atlas dictionaries measure TEXT"


@pytest.mark.parametrize(
    ("measured", "found"),
    [
        ({"explained_variance": 0.5, "loss_kept": 0.8}, []),
        ({"explained_variance": None, "loss_kept": None}, []),
        ({"explained_variance": 0.499}, ["explained variance 0.50"]),
        ({"loss_kept": -1.0, "explained_variance": float("nan")}, ["explained variance nan", "loss kept -1.00"]),
        ({"l0": 0.0, "error_share": 9.0}, []),
    ],
)
def test_what_is_called_bad(measured: dict[str, float | None], found: list[str]) -> None:
    assert faults(**measured) == found
