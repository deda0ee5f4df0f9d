"""Flask on Gunicorn, as PyTorch's tutorial and Flask's deployment page have it: worker processes, no batches."""

from __future__ import annotations

import classifier
from flask import Flask, Response, jsonify, request

app = Flask(__name__)
model = classifier.load()


@app.route("/predict", methods=["POST"])
def predict() -> Response:
    """Classify one uploaded picture."""
    data = request.files["file"].read()
    return jsonify(model.predict([model.decode(data)])[0])
