"""`python -m server.healthcheck`: exit status 0 when the server says that it serves, else 1."""

from __future__ import annotations

import sys

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


@click.command()
@click.option(
    "--address",
    default="127.0.0.1:50051",
    envvar="KASA_ADDRESS",
    show_default=True,
    show_envvar=True,
    help="the server's gRPC",
)
@click.option("--name", default="", help="a service, or adapter/NAME; the server itself by default")
@click.option("--timeout", "timeout_s", default=3.0, show_default=True, help="in seconds")
def main(address: str, name: str, timeout_s: float) -> None:
    """Ask a server for its health."""
    problem = check(address, name, timeout_s)
    if problem:
        click.echo(problem, err=True)
    sys.exit(1 if problem else 0)


def check(address: str, name: str = "", timeout_s: float = 3.0) -> str:
    """What is wrong, or ""."""
    with grpc.insecure_channel(address) as channel:
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
