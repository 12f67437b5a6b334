import pytest
import torch
from torch import nn

from hf_vq.training.weight_ema import WeightEMA


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).to(torch.float32)
    net[2].bias.requires_grad_(False)
    return net


def test_the_average_against_its_closed_form():
    net = model()
    ema = WeightEMA(net, decay=0.7)
    expected = net[0].weight.detach().double().clone()
    for update in range(1, 30):
        with torch.no_grad():
            net[0].weight.copy_(torch.randn(3, 2))
            net[2].bias.fill_(update)
        net[1].running_mean.fill_(update)
        ema.update()
        decay = min(0.7, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * net[0].weight.detach().double()
        torch.testing.assert_close(ema.averages["0.weight"].double(), expected, rtol=1e-5, atol=1e-6)
        assert (ema.copies["1.running_mean"] == update).all() and (ema.copies["2.bias"] == update).all()
    assert set(ema.copies) == {"2.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_applied_and_back():
    net = model()
    ema = WeightEMA(net, decay=0.9)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    ema.update()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(KeyError), ema.applied() as averaged:
        assert averaged is net and torch.equal(net[0].weight, ema.averages["0.weight"])
        assert not torch.equal(net[0].weight, before["0.weight"])
        raise KeyError("an error inside still gives the weights back")
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_half_precision_weights_have_a_float32_average():
    net = nn.Linear(4, 4).to(torch.bfloat16)
    ema = WeightEMA(net, decay=0.999)
    for _ in range(5):
        ema.update()
    assert ema.averages["weight"].dtype == torch.float32
    with ema.applied():
        assert net.weight.dtype == torch.bfloat16


def test_state_round_trip():
    first = WeightEMA(model(), 0.9)
    with torch.no_grad():
        first.model[0].weight.add_(1)
    first.update()
    second = WeightEMA(model(), 0.9)
    second.load_state_dict(first.state_dict())
    assert second.num_updates == 1 and torch.equal(second.averages["0.weight"], first.averages["0.weight"])
    with pytest.raises(ValueError, match="other averages"):
        WeightEMA(nn.Linear(2, 2), 0.9).load_state_dict(first.state_dict())


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match=f"decay={decay}"):
        WeightEMA(nn.Linear(1, 1), decay)
