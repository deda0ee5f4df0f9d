"""Multi Model Server's front end misreads an answer's headers that arrive in two pieces: keep them in one.

`CodecUtils.readMap` of its `model-server.jar` takes a header that is not there yet for a corrupt frame,
closes the connection and fails the whole batch with "Worker died"; every other field waits for its rest.
Netty reads as much at a time as the last answers were long, so a full batch after some lone requests is
cut somewhere. TorchServe has mended this.
"""

from __future__ import annotations

from typing import Any

# The status message comes before the answers, can be cut without harm and is shown to nobody. Padded to
# 20 KiB, every read that is cut is cut inside it, Netty's guess grows to its largest, 64 KiB, and never
# falls, since no answer is under a quarter of that.
_MESSAGE_BYTES = 20 * 1024 - 8


def keep_answers_whole() -> None:
    """Pad the message of every answered batch of this worker; to be called on Multi Model Server only."""
    from mms import service

    create = service.create_predict_response

    def padded(ret: Any, ids: Any, message: str, code: int, context: Any = None) -> Any:
        # Without a context it is an error, whose message goes to the client.
        return create(ret, ids, message.ljust(_MESSAGE_BYTES) if context else message, code, context=context)

    service.create_predict_response = padded
