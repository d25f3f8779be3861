"""SOFIM in the frameworks that people train with. One module per framework; nothing is imported before you ask for it.

=================================== ====================================================================================
``integrations.transformers``       Hugging Face's Trainer: the optimizer from its arguments, metrics, ``in_backward``
``integrations.accelerate``         Accelerate: ``in_backward`` and ``release_grads``, metrics on the prepared optimizer
``integrations.lightning``          Lightning: a callback for metrics, clipping and ``in_backward``
``integrations.timm``               timm: ``sofim`` and ``adasofim`` by name
``integrations.deepspeed``          DeepSpeed: ZeRO-1 and ZeRO-2
``integrations.metrics``            what the optimizer knows of its last step, as numbers; for loops of your own
=================================== ====================================================================================

``docs/frameworks.md`` has a table of what works where, with the versions that were tested.
"""
