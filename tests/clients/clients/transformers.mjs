// transformers.js as it comes from npm: processor, generate() and its cache. The same file runs in
// Node.js and in a browser; only where models and pictures are differs.

import { AutoProcessor, AutoModelForImageTextToText, RawImage, Tensor, cat, env } from "@huggingface/transformers";

export const version = () => `transformers.js ${env.version}`;

/// Answers every case of a job. `models` is the folder or address that the model's directory is in.
export async function run(job, models, settings = {}) {
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = models;
  env.useBrowserCache = false;
  // Files whose weights lie beside them, as a model's "transformers.js_config" would say.
  const use_external_data_format = Object.fromEntries(job.external.map((module) => [module, true]));
  const options = { dtype: "fp32", use_external_data_format, ...settings };
  const model = await AutoModelForImageTextToText.from_pretrained(job.model, options);
  const processor = await AutoProcessor.from_pretrained(job.model);
  const client = new Client(model, processor, job.tokens);
  const answers = {};
  for (const one of job.cases) {
    answers[one.name] = one.batch ? await client.batch(one.rows) : await client.conversation(one.turns);
  }
  return answers;
}

class Client {
  constructor(model, processor, tokens) {
    Object.assign(this, { model, processor, tokens });
    this.image = processor.config.image_token;
  }

  chat(turn) {
    const content = [...turn.images.map(() => ({ type: "image" })), { type: "text", text: turn.prompt }];
    return this.processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
  }

  /// What the model takes for prompts with their pictures.
  async inputs(prompts, pictures, options = {}) {
    const images = await Promise.all(pictures.map((p) => RawImage.read(p)));
    if (images.length == 0) {
      return this.processor.tokenizer(prompts, { padding: true, ...options });
    }
    if (prompts.every((p) => p.split(this.image).length == 2)) {
      return this.processor(images, prompts, { padding: true, ...options });
    }
    // LlavaProcessor expands the first placeholder of a text only, whatever the model: here all are
    // expanded by its own settings.
    const seen = await this.processor.image_processor(images);
    const [height, width] = seen.pixel_values.dims.slice(-2);
    const { patch_size, num_additional_image_tokens } = this.processor.config;
    const grid = Math.floor(height / patch_size) * Math.floor(width / patch_size);
    const many = this.image.repeat(grid + num_additional_image_tokens);
    const expanded = prompts.map((p) => p.replaceAll(this.image, many));
    return { ...seen, ...this.processor.tokenizer(expanded, { padding: true, ...options }) };
  }

  async generate(inputs) {
    return this.model.generate({
      ...inputs,
      max_new_tokens: this.tokens,
      do_sample: false,
      return_dict_in_generate: true,
    });
  }

  /// One prompt, and further ones on the cache that generate() returns.
  async conversation(turns) {
    const answers = [];
    let before;
    for (const turn of turns) {
      const prompt = this.chat(turn);
      let inputs = await this.inputs([before ? " " + prompt : prompt], turn.images, { add_special_tokens: !before });
      if (before) {
        // The whole conversation, of which generate() cuts off what is in the cache.
        const input_ids = cat([before.sequences, inputs.input_ids], 1);
        const attention_mask = new Tensor("int64", new BigInt64Array(input_ids.size).fill(1n), input_ids.dims);
        inputs = { ...inputs, input_ids, attention_mask, past_key_values: before.past_key_values };
      }
      const prompted = inputs.input_ids.dims[1];
      before = await this.generate(inputs);
      answers.push(ids(before.sequences.slice(null, [prompted, null]))[0]);
    }
    return answers;
  }

  /// Prompts side by side.
  async batch(rows) {
    const prompts = rows.map((row) => this.chat(row));
    const inputs = await this.inputs(prompts, rows.flatMap((row) => row.images));
    const output = await this.generate(inputs);
    return ids(output.sequences.slice(null, [inputs.input_ids.dims[1], null]));
  }
}

const ids = (tensor) => tensor.tolist().map((row) => row.map(Number));
