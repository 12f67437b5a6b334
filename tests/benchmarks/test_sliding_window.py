from benchmarks.sliding_window import measure
from hf_vq import VQGPTForCausalLM


def test_a_window_of_the_priors_size_samples_each_code(monkeypatch):
    lengths, generate = [], VQGPTForCausalLM.generate

    def counted(self, prompt, **kwargs):
        lengths.append(kwargs["max_new_tokens"])
        return generate(self, prompt, **kwargs)

    monkeypatch.setattr(VQGPTForCausalLM, "generate", counted)
    found = measure(height=8, width=6, side=4, stride=2, layers=1, threads=1)
    assert sum(lengths[1:]) == 8 * 6 and found["seconds"] > 0
