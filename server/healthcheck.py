"""`python -m server.healthcheck`: exit status 0 when the server says that it serves, else 1."""

from __future__ import annotations

import sys

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kasa_runtime.client_security import SecurityOptions, open_channel
from kasa_runtime.commands.server_address import address_option, security_of


@click.command()
@address_option
@click.option("--name", default="", help="a service, or adapter/NAME; the server itself by default")
@click.option("--timeout", "timeout_s", default=3.0, show_default=True, help="in seconds")
@click.pass_context
def main(context: click.Context, /, address: str, name: str, timeout_s: float) -> None:
    """Ask a server for its health."""
    problem = check(address, name, timeout_s, security_of(context))
    if problem:
        click.echo(problem, err=True)
    sys.exit(1 if problem else 0)


def check(
    address: str, name: str = "", timeout_s: float = 3.0, security: SecurityOptions | None = None
) -> str:
    """What is wrong, or ""."""
    with open_channel(address, security or {}, options=[]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=name)
        try:
            status = stub.Check(request, timeout=timeout_s).status
        except grpc.RpcError as error:
            return f"{address}: {error.code().name}: {error.details()}"
    if status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}"


if __name__ == "__main__":
    main()
