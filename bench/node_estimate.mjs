// What node-llama-cpp estimates from GGUF headers: node node_estimate.mjs FILE...
// One line of JSON a file: bytes of weights and of the context on one GPU that takes every layer.
// `estimate...Requirements` are its estimates from the header; their V2 ask llama.cpp itself, on a GPU that is there.
import {GgufInsights, getLlama, LlamaLogLevel, readGgufFileInfo} from "node-llama-cpp";

const BATCH = 512, CONTEXT = 8192;
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error});
for (const path of process.argv.slice(2)) {
    const info = await readGgufFileInfo(path);
    const insights = await GgufInsights.from(info, llama);
    const layers = insights.totalLayers, trained = insights.trainContextSize ?? CONTEXT;
    let told;
    try {
        const model = insights.estimateModelResourceRequirements({gpuLayers: layers, useMmap: false});
        const context = insights.estimateContextResourceRequirements({
            contextSize: Math.min(CONTEXT, trained), modelGpuLayers: layers, batchSize: BATCH, sequences: 1,
            flashAttention: true
        });
        told = {weights: Math.round(model.gpuVram), context: Math.round(context.gpuVram)};
    } catch (error) {
        told = {problem: String(error)};
    }
    console.log(JSON.stringify({path, ...told}));
}
process.exit(0);  // else its worker threads keep it alive
