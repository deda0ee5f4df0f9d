"""Ray Serve's guide to batching: serve.batch of 8, 100 ms, a replica of one CPU a core."""

import signal
import threading
from typing import Any

import classifier
import ray
from ray import serve
from starlette.requests import Request

settings = classifier.settings()


@serve.deployment(
    num_replicas=settings.workers,
    ray_actor_options={"num_cpus": 1},
    # A replica takes no batch larger than what it may hold at once.
    max_ongoing_requests=2 * settings.batch_size,
)
class Classifier:
    """One model a replica."""

    def __init__(self) -> None:
        self.model = classifier.load()

    @serve.batch(max_batch_size=settings.batch_size, batch_wait_timeout_s=settings.max_batch_delay / 1000)
    async def classify(self, bodies: list[bytes]) -> list[Any]:
        """Decode and classify a batch."""
        return self.model.predict([self.model.decode(body) for body in bodies])

    async def __call__(self, request: Request) -> Any:
        """Answer one request."""
        return await self.classify(await request.body())


def stay_on_loopback() -> None:
    """Runs first in each of Ray's workers: a replica's own gRPC port listens everywhere, which no setting changes."""
    from ray.serve._private import replica

    add = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add(server, address.replace("[::]", "127.0.0.1"))


if __name__ == "__main__":
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    ray.init(
        address="local",
        num_cpus=settings.workers,
        include_dashboard=False,
        _temp_dir=settings.scratch,
        _node_ip_address="127.0.0.1",
        runtime_env={"worker_process_setup_hook": stay_on_loopback},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": settings.port})
    serve.run(Classifier.bind())
    asked.wait()
    serve.shutdown()
    ray.shutdown()
