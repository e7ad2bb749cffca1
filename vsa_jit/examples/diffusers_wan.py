"""Video Sparse Attention in diffusers' Wan: generate, and look at what a sparsity costs.

Needs ``pip install 'vsa-jit[diffusers]'``. Without arguments: a tiny pipeline with random weights, in seconds, on a CPU
too. With a checkpoint, and what diffusers writes videos with (``pip install imageio imageio-ffmpeg``):

    python -m vsa_jit.examples.diffusers_wan --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --sparsity 0.8
    python -m vsa_jit.examples.diffusers_wan --model FastVideo/FastWan2.1-T2V-1.3B-Diffusers \\
        --gates FastVideo/FastWan2.1-T2V-1.3B-Diffusers --sparsity 0.8 --steps 3
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from vsa_jit.integrations.diffusers import enable_vsa, record


def tiny_pipeline() -> Any:
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, text_dim=16, freq_dim=16, ffn_dim=64, num_layers=3
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a pipeline of Wan in diffusers' format; default: tiny, with random weights")
    parser.add_argument("--prompt", default="a cat walks on the beach, realistic")
    parser.add_argument("--gates", help="where the gates of a FastWan checkpoint are")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--dense-steps", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", default="wan", help="video and picture are OUTPUT.mp4 and OUTPUT.png")
    args = parser.parse_args(argv)

    if args.model is None:
        pipe = tiny_pipeline()
        inputs = {"prompt_embeds": torch.randn(1, 7, 16), "guidance_scale": 1.0, "output_type": "latent"}
        inputs |= {"height": 96, "width": 96, "num_frames": 17}
    else:
        from diffusers import WanPipeline

        pipe = WanPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to("cuda")
        inputs = {"prompt": args.prompt, "height": 480, "width": 832, "num_frames": 81}

    def generate(what: str) -> Any:
        start = time.perf_counter()
        frames = pipe(**inputs, num_inference_steps=args.steps, generator=torch.Generator().manual_seed(0)).frames
        print(f"{what}: {time.perf_counter() - start:.2f} s, with all that is compiled on the way")
        return frames

    generate("all steps dense")
    enable_vsa(pipe, sparsity=args.sparsity, gates=args.gates, dense_steps=args.dense_steps)
    frames = generate(f"sparsity {args.sparsity:g}, after dense steps: {args.dense_steps}")
    if args.model is not None:
        from diffusers.utils import export_to_video

        export_to_video(frames[0], f"{args.output}.mp4", fps=16)

    with record(pipe) as recording:
        generate("recording")
    print(recording)
    recording.plot(f"{args.output}.png")


if __name__ == "__main__":
    main()
