"""What this build can do, so that callers need not probe signatures.

``API_VERSION`` grows by one whenever a documented call changes in a way that a caller must know.
A name in ``CAPABILITIES`` is a promise that is covered by the test suite.
"""

API_VERSION = 1

CAPABILITIES = frozenset(
    {
        "mlp_node",
        "run_sonic_moe",
        "cpu",
        "bf16",
        "fp8_sm90_emulation",
        "fp8_sm100_emulation",
        "fp8_wgrad",
        "fp8_recompute_z",
        "fp8_dispatch",
        "fp8_dispatch_packed_ue8m0",
        "fp8_combine_grad",
        "fp8_weights_from_caller",
        "iso32_weights",
        "swiglu_clamp",
        "wgrad_deferral",
        "weight_layout_fusion",
        "dispatch_ids_at_or_above_E",
        "gemm_multiprocessors",
        "expert_parallel",
    }
)
