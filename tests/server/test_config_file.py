from __future__ import annotations

import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kasa_runtime.cli import cli
from kasa_runtime.commands import serve
from kasa_runtime.commands.config_file import check_environment, config_option, read
from kasa_runtime.commands.flags import build, leaves, options
from kasa_runtime.errors import ConfigError
from server.config import ServeConfig


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "kasa.toml"

    def write(text: str) -> Path:
        path.write_text(text, encoding="utf-8")
        return path

    return write


def print_config(*arguments: object, **environment: str) -> str:
    flags = ["--print-config", *map(str, arguments)]
    result = CliRunner().invoke(serve.command, flags, env=environment)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def configured(*arguments: object, **environment: str) -> ServeConfig:
    """What the same arguments would be served with."""
    seen = []

    @click.command(context_settings={"auto_envvar_prefix": "KASA"})
    @config_option(ServeConfig)
    @options(ServeConfig)
    def command(**values: object) -> None:
        seen.append(build(ServeConfig, values))

    result = CliRunner().invoke(command, [*map(str, arguments)], env=environment)
    assert result.exit_code == 0, (result.output, result.exception)
    return seen[0]


def test_flags_win_over_the_environment_and_that_over_the_file(file):
    path = file("[server]\ngrpc_port = 1\nhttp_port = 2\ndrain_s = 3")
    text = print_config("--config", path, "--grpc-port", 7, KASA_GRPC_PORT="6", KASA_HTTP_PORT="5")
    server = tomllib.loads(text)["server"]
    assert (server["grpc_port"], server["http_port"], server["drain_s"]) == (7, 5, 3.0)
    lines = text.splitlines()
    assert "grpc_port = 7  # --grpc-port" in lines
    assert "http_port = 5  # KASA_HTTP_PORT" in lines
    assert "drain_s = 3.0  # file" in lines
    assert 'host = "127.0.0.1"  # default' in lines


def test_the_file_can_be_named_in_the_environment(file):
    path = file('[runtime]\nmodel = "m"')
    assert 'model = "m"  # file' in print_config(KASA_CONFIG=str(path))


def test_what_is_printed_reads_back_as_the_same_configuration(file):
    given = ["--model", 'a "b" \\ \u00e9\n\x7f', "--pin", "one", "--pin", "two"]
    given += ["--drain-s", "1e-07", "--no-cuda-graphs", "--engine-arg", "a=[1, 2]"]
    path = file(print_config(*given))
    assert configured("--config", path) == configured(*given) != ServeConfig()


def test_every_setting_is_printed(file):
    text = print_config()
    assert configured("--config", file(text)) == ServeConfig()
    for leaf in leaves(ServeConfig):
        assert f"\n{leaf.name} = " in text or f"\n# {leaf.name} is not set" in text


def test_a_file_has_every_type_of_setting(file):
    path = file(
        '[runtime]\nadapters_dir = "there"\npin = ["a"]\nhost_cache_gib = 2\n'
        '[runtime.native]\ncuda_graphs = false\ndtype = "float32"\nmax_queue = 3\n'
    )
    runtime = configured("--config", path).runtime
    assert (runtime.adapters_dir, runtime.pin) == (Path("there"), ("a",))
    assert (runtime.host_cache_gib, runtime.native.cuda_graphs) == (2.0, False)
    assert (runtime.native.dtype, runtime.native.max_queue) == ("float32", 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\ngrpc_prot = 1", r"unknown key server.grpc_prot; did you mean server.grpc_port"),
        ("[serber]\nhost = 'x'", r"unknown key serber; did you mean server\?"),
        ("grpc_port = 1", r"unknown key grpc_port; did you mean server.grpc_port"),
        ("[runtime]\nxyzzy = 1", r"unknown key runtime.xyzzy$"),
        ("server = 1", r"unknown key server"),
        ("[server.host]\na = 1", r"server.host must be a string"),
        ("[server]\ngrpc_port = '1'", r"server.grpc_port must be an integer, got '1'"),
        ("[server]\ngrpc_port = true", r"server.grpc_port must be an integer, got True"),
        ("[server]\ngrpc_port = 1.5", r"server.grpc_port must be an integer, got 1.5"),
        ("[server]\ndrain_s = 'x'", r"server.drain_s must be a number"),
        ("[runtime]\npin = 'a'", r"runtime.pin must be an array"),
        ("[runtime]\npin = [1]", r"runtime.pin must be a string, got 1"),
        ("[runtime.native]\ndtype = 'x'", r"runtime.native.dtype must be one of auto, float32"),
        ("[runtime.native]\ncuda_graphs = 1", r"runtime.native.cuda_graphs must be true or false"),
        ("a =", r"is no TOML"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_key(file, text, message):
    with pytest.raises(ConfigError, match=message):
        read(file(text), ServeConfig)


def test_a_wrong_file_ends_the_command_with_one_line(file):
    result = CliRunner().invoke(cli, ["serve", "--config", str(file("a ="))])
    assert result.exit_code == 1
    assert result.stderr.startswith("kasa: error: ") and result.stderr.count("\n") == 1


def test_a_variable_that_is_nearly_a_setting_is_an_error_and_others_are_let_be():
    with pytest.raises(ConfigError, match=r"KASA_GRPC_PROT .* mean KASA_GRPC_PORT\?"):
        check_environment(ServeConfig, {"KASA_GRPC_PROT": "1"})
    of_others = ("KASA_SERVICE_HOST", "KASA_PORT_50051_TCP_ADDR", "KASA_HOME", "KASA_ADDRESS")
    check_environment(ServeConfig, dict.fromkeys((*of_others, "GRPC_PROT", "KASA_GRPC_PORT"), "x"))
