"""Model shapes for runs that start from random weights, as the fields of HF's config.json."""

from ml_collections import ConfigDict


def llama_demo() -> ConfigDict:
    """The demo's base: 0.69 M parameters beside a tied 4,096 x 128 embedding."""
    return ConfigDict(
        {
            "vocab_size": 4096,
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "max_position_embeddings": 1024,
            "rope_theta": 10000.0,
        }
    )
