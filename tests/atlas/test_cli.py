"""The command line: quick help, one sentence and status 2 on bad input, and `atlas verify`."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from atlas import __version__, cli, connect
from atlas.schema import prepare
from atlas.writer import register, write_prompt
from tests.synthetic import synthetic_model, synthetic_prompt, synthetic_run


def _atlas(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from atlas.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_help_loads_neither_torch_nor_the_database() -> None:
    code = (
        "import sys; sys.argv = ['atlas', '--help']\nfrom atlas.cli import main\ntry: main()\n"
        "finally: print(sorted({'torch', 'neo4j', 'pandas', 'jpype'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "verify" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_version(tmp_path: Path) -> None:
    assert _atlas("--version", cwd=tmp_path).stdout == f"atlas, version {__version__}\n"


def test_an_unknown_command(tmp_path: Path) -> None:
    done = _atlas("brew", cwd=tmp_path)
    assert done.returncode == 2
    assert "No such command 'brew'" in done.stderr


def test_bad_input_is_a_sentence(tmp_path: Path) -> None:
    done = _atlas("verify", "--store", "typo", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: There is no store in ")
    assert done.stderr.count("\n") == 1


def _interrupt(**_: object) -> None:
    raise KeyboardInterrupt


def _interrupt_with_a_complaint(**_: object) -> None:
    try:
        _interrupt()
    finally:
        raise BufferError("what was cut short")  # as the driver does while it closes a connection


@pytest.mark.parametrize("interrupt", [_interrupt, _interrupt_with_a_complaint])
def test_ctrl_c(
    interrupt: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.atlas, "main", interrupt)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_an_error_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.atlas, "main", _fail)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def _fail(**_: object) -> None:
    raise ZeroDivisionError


def test_verify_prints_a_line_a_check_and_says_by_status_what_it_found(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with connect(folder) as store:
        prepare(store)
        register(store, synthetic_model(), synthetic_run())
        write_prompt(store, synthetic_prompt(1, n_tokens=3, n_active=1), "run-1")
    sound = _atlas("verify", "--store", folder, cwd=tmp_path)
    assert (sound.returncode, sound.stderr) == (0, "")
    assert "conservation" in sound.stdout
    assert sound.stdout.endswith("No violations.\n")
    with connect(folder) as store:
        store.write(lambda t: t.run("MATCH (c:Circuit) WITH c LIMIT 1 SET c.n_edges = 0").consume())
    broken = _atlas("verify", "--store", folder, cwd=tmp_path)
    assert broken.returncode == 1
    assert broken.stdout.endswith("1 violations.\n")
