"""Stands for the library's tests of its exporters, which no source distribution has: torch.export of every class."""

import torch


class ExportTesterMixin:
    test_torch_exportable = False

    def test_torch_export(self):
        """An exported model gives the model's own outputs, for the inputs it was exported with and for the same sequences in another order."""
        if not self.test_torch_exportable:
            self.skipTest("Model architecture is not exportable (`test_torch_exportable` is False)")
        config, inputs_dict = self.model_tester.prepare_config_and_inputs_for_common()
        config.use_cache = False  # a cache is no output of an exported program
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__), torch.no_grad():
                model = model_class(config).eval()
                inputs = self._prepare_for_class(inputs_dict, model_class)
                exported = torch.export.export(model, args=(), kwargs=inputs, strict=False).module()
                others = {k: v.roll(1, dims=0) if torch.is_tensor(v) else v for k, v in inputs.items()}
                for kwargs in (inputs, others):
                    expected, actual = model(**kwargs), exported(**kwargs)
                    self.assertEqual(set(expected), set(actual))
                    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)
