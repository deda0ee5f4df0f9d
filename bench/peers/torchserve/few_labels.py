"""TorchServe's stock image classifier for a model of fewer than five labels, on which the stock one fails."""

from typing import Any

from ts.torch_handler.image_classifier import ImageClassifier


class FewLabels(ImageClassifier):
    """Asks for as many labels as there are, with the method that its documentation gives for that."""

    def initialize(self, context: Any) -> None:
        super().initialize(context)
        self.set_max_result_classes(len(self.mapping))
