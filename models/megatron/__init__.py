"""longspan's layers in Megatron's models: `block_spec` gives a GPTModel of megatron-core layers that use them.

Imported by name only, since it needs megatron-core.
"""

try:
    import megatron.core  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"longspan.models.megatron needs megatron-core ({error}); pip install 'megatron-core>=0.16.1,<0.17'"
    ) from error

from longspan.models.megatron.spec import block_spec

__all__ = ["block_spec"]
