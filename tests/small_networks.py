"""Small sizes for the networks whose blocks are read."""

from residrop.research.bench import found


def small_found(patch):
    """Let the networks of `found.FOUND` be made small."""
    t5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_heads": 2, "vocab_size": 40}
    opt = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    patch.setattr(found, "T5_SMALL", t5)
    patch.setattr(found, "OPT_6", {**opt, "max_position_embeddings": 64})
    llama = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    patch.setattr(found, "LLAMA_8", {**llama, "vocab_size": 40})
    patch.setattr(found, "CONVNEXT_TINY", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)})
    patch.setattr(found, "HIERA_TINY", {"embed_dim": 16, "num_heads": 1, "stages": (1, 2, 1, 1)})
