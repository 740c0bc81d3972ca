"""Runs in autoawq's environment: writes a small random model with autoawq's own packing and its own way to save.

    python autoawq_write.py FOLDER WEIGHTS.safetensors

FOLDER becomes the artifact; WEIGHTS.safetensors holds what autoawq reads from its words again, float16 [in, out] by the
name of each linear layer. Its search for scales cannot run on a CPU, so scales and zero points are plain rounding's.
"""

import sys

import torch
from awq.models.base import AwqConfig
from awq.models.llama import LlamaAWQForCausalLM
from awq.modules.linear import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

GROUP = 64


def main() -> None:
    folder, weights = sys.argv[1:]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        torch_dtype=torch.float16,
    )
    model = LlamaForCausalLM(config).half()
    read_again = {}
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]:
        packed = pack(linear)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed)
        read_again[name] = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, GROUP).contiguous()
    settings = AwqConfig(quant_method="awq", zero_point=True, q_group_size=GROUP, w_bit=4, version="GEMM")
    LlamaAWQForCausalLM(model, "llama", True, config, settings, None).save_quantized(folder)
    save_file(read_again, weights)


def pack(linear: torch.nn.Linear) -> WQLinear_GEMM:
    grouped = linear.weight.data.unflatten(1, (-1, GROUP)).float()
    least, largest = grouped.amin(2), grouped.amax(2)
    scales = ((largest - least) / 15).half()
    zeros = (-least / scales).round().clamp(0, 15)
    rounded = (linear.weight.data / scales.repeat_interleave(GROUP, 1) + zeros.repeat_interleave(GROUP, 1)).round()
    codes = rounded.clamp(0, 15) - zeros.repeat_interleave(GROUP, 1)
    linear.weight.data = (codes * scales.repeat_interleave(GROUP, 1)).half()
    return WQLinear_GEMM.from_linear(linear, 4, GROUP, False, scales.t().contiguous(), zeros.t().contiguous())


if __name__ == "__main__":
    main()
