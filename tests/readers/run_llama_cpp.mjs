// Greedy tokens by llama.cpp for one GGUF file: run_llama_cpp.mjs FILE COUNT ID...
// Run where node-llama-cpp is installed (cwd); prints one line of JSON. llama.cpp ends the whole
// process where a model breaks what it asserts, so a process is for one model.
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const here = createRequire(process.cwd() + "/package.json");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(here.resolve("node-llama-cpp")));
const [file, count, ...prompt] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 128, threads: 1});
const tokens = [];
const evaluated = context.getSequence().evaluate(prompt.map(Number), {temperature: 0, yieldEogToken: true});
for await (const token of evaluated) {
    tokens.push(token);
    if (tokens.length >= Number(count)) break;
}
console.log(JSON.stringify({tokens}));
process.exit(0);
