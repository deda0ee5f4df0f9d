"""LitServe, as its guide to faster serving has it: base64 in JSON, `max_batch_size`, workers per device."""

# No postponed annotations here: LitServe reads them.
import base64
from typing import Any

import classifier
import litserve as ls
from fastapi import Request

settings = classifier.settings()


class Api(ls.LitAPI):
    """Decodes and predicts in a worker; LitServe gathers and scatters the batch."""

    def setup(self, device: str) -> None:
        """Load the model once a worker."""
        self.classifier = classifier.load()

    def decode_request(self, request: Request) -> Any:
        """Decode one picture."""
        picture: Any = request
        return self.classifier.decode(base64.b64decode(picture["image_data"]))

    def batch(self, inputs: list[Any]) -> Any:
        """Hand the list over; the classifier stacks it."""
        return inputs

    def predict(self, x: Any) -> Any:
        """Classify the batch, or one picture where nothing is batched."""
        return self.classifier.predict(x) if isinstance(x, list) else self.classifier.predict([x])[0]

    def unbatch(self, output: Any) -> Any:
        """One answer a request."""
        return output

    def encode_response(self, output: Any) -> Any:
        """Answer with the labels."""
        return output


if __name__ == "__main__":
    api = Api(max_batch_size=settings.batch_size, batch_timeout=settings.delay)
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=settings.workers, timeout=60)
    server.run(host="127.0.0.1", port=settings.port, generate_client_file=False)
