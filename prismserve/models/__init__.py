"""Models: the native decoder, vision towers, weight loading, text and image processing, one file per family.

May import ``kernels`` and ``core``, beside torch, transformers and safetensors. ``loader.load_model`` gives a
:class:`prismserve.models.base.VisionLanguageModel`; ``processing.Processor`` needs no weights.
"""
