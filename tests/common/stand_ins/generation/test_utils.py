"""Stands for the library's tests of `generate`, which no source distribution has: its stock modes on every class."""

import torch


NEW_TOKENS = 8


class GenerationTesterMixin:
    def _generating_models(self):
        config, inputs_dict = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_generative_model_classes:
            torch.manual_seed(0)
            model = model_class(config).eval()
            # Larger weights than at the start: else every mode writes the same token again and again.
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            # The library draws tokens anew in every run; where one is padding, assisted decoding infers a mask from it.
            input_ids = inputs_dict["input_ids"][:2]
            input_ids = input_ids.masked_fill(input_ids == config.pad_token_id, config.pad_token_id + 1)
            yield model, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def _generate(self, model, inputs, **options):
        torch.manual_seed(0)
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, **options}
        return model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)

    def _assert_same_text(self, model, inputs, options, other_options):
        one, other = self._generate(model, inputs, **options), self._generate(model, inputs, **other_options)
        self.assertEqual(one.sequences.shape[1], inputs["input_ids"].shape[1] + NEW_TOKENS)
        self.assertTrue(torch.equal(one.sequences, other.sequences))

    def test_generate_greedily_with_and_without_cache(self):
        for model, inputs in self._generating_models():
            cached, plain = self._generate(model, inputs), self._generate(model, inputs, use_cache=False)
            self.assertTrue(torch.equal(cached.sequences, plain.sequences))
            torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
            self.assertIsNotNone(cached.past_key_values)

    def test_generate_samples_with_and_without_cache(self):
        for model, inputs in self._generating_models():
            self._assert_same_text(model, inputs, {"do_sample": True}, {"do_sample": True, "use_cache": False})

    def test_generate_with_beams_with_and_without_cache(self):
        for model, inputs in self._generating_models():
            beams = {"num_beams": 3, "num_return_sequences": 2}
            self._assert_same_text(model, inputs, beams, {**beams, "use_cache": False})

    def test_generate_assisted_as_unassisted(self):
        for model, inputs in self._generating_models():
            inputs = {name: values[:1] for name, values in inputs.items()}
            self._assert_same_text(model, inputs, {}, {"assistant_model": model})

    def test_generate_with_prompt_lookup_as_without(self):
        for model, inputs in self._generating_models():
            inputs = {name: values[:1].repeat(1, 2) for name, values in inputs.items()}
            self._assert_same_text(model, inputs, {}, {"prompt_lookup_num_tokens": 2})

    def test_generate_from_embeddings_as_from_ids(self):
        for model, inputs in self._generating_models():
            text = self._generate(model, inputs).sequences[:, inputs["input_ids"].shape[1] :]
            embeddings = model.get_input_embeddings()(inputs["input_ids"])
            inputs = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
            self.assertTrue(torch.equal(self._generate(model, inputs).sequences, text))

    def test_generate_goes_on_from_a_cache(self):
        for model, inputs in self._generating_models():
            whole = self._generate(model, inputs)
            half = {"max_new_tokens": NEW_TOKENS // 2, "min_new_tokens": NEW_TOKENS // 2}
            first = self._generate(model, inputs, **half)
            new = torch.ones_like(first.sequences[:, : NEW_TOKENS // 2])
            inputs = {
                "input_ids": first.sequences,
                "attention_mask": torch.cat([inputs["attention_mask"], new], dim=1),
                "past_key_values": first.past_key_values,
            }
            self.assertTrue(torch.equal(self._generate(model, inputs, **half).sequences, whole.sequences))

    def test_generate_is_blind_to_left_padding(self):
        for model, inputs in self._generating_models():
            text = self._generate(model, inputs).sequences
            pad = torch.full_like(inputs["input_ids"][:, :3], model.config.pad_token_id)
            padded = {
                "input_ids": torch.cat([pad, inputs["input_ids"]], dim=1),
                "attention_mask": torch.cat([torch.zeros_like(pad), inputs["attention_mask"]], dim=1),
            }
            self.assertTrue(torch.equal(self._generate(model, padded).sequences[:, 3:], text))
