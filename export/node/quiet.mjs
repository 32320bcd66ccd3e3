// Imported before onnxruntime-node, which would send telemetry from the moment that it is loaded.
// Who has set the variable himself keeps his choice.

process.env.ORT_DISABLE_TELEMETRY ??= "1";
