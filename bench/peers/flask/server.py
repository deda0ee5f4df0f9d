"""PyTorch's Flask tutorial on Gunicorn: an uploaded file, two workers a core, no batches."""

import classifier
from flask import Flask, Response, jsonify, request

app = Flask(__name__)
model = classifier.load()


@app.route("/predict", methods=["POST"])
def predict() -> Response:
    """Classify one uploaded picture."""
    return jsonify(model.predict([model.decode(request.files["file"].read())])[0])
