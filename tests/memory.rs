//! Memory of a rewrite does not grow with the weights: they are neither read into memory nor looked at through
//! the mapping of the file, whose pages count as the process's.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use duet_onnx::arch::Vlm;
use duet_onnx::ir::verify;
use duet_onnx::onnx::{read, serialize};
use duet_onnx::passes::{Recipe, rewrite};
use duet_onnx::proto::tensor_proto::{DataLocation, DataType};
use duet_onnx::proto::{ModelProto, StringStringEntryProto, TensorProto};
use prost::Message;
use prost::encoding::encode_varint;

const DECODER: &str = "models/llava/fixtures/dynamo23-mha/onnx/decoder_model_merged.onnx";
const RECIPE: &str = "version: 1\npasses:\n  - visual_prune:\n      drops: [{ after_layer: 4, keep: 0.5 }]\nmarker: input\n";
/// Weights that are added to the model, in bytes.
const BALLAST: usize = 96 << 20;
/// Number of tensors that they are in, where they are in many.
const PIECES: usize = 32;
/// What a rewrite may take: the graph is there several times, in several forms.
const LIMIT: usize = 24 << 20;

/// Counts what is allocated.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Resident memory of this process, mapped files included: (now, most since the mark was last reset).
#[cfg(target_os = "linux")]
fn resident() -> (usize, usize) {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let of = |key: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(key));
        let number = line.and_then(|l| l.split_whitespace().next());
        number.expect("a number").parse::<usize>().expect("kB") << 10
    };
    (of("VmRSS:"), of("VmHWM:"))
}

/// Reads, rewrites and writes a model; what that took: (allocated, resident where the system says).
fn rewriting(path: &Path, out: &Path) -> (usize, usize) {
    let recipe = Recipe::parse(RECIPE).expect("a recipe");
    let allocated = NOW.load(Ordering::SeqCst);
    MOST.store(allocated, Ordering::SeqCst);
    #[cfg(target_os = "linux")]
    let before = {
        // Resets the high-water mark.
        std::fs::write("/proc/self/clear_refs", "5").expect("reset");
        resident().0
    };
    let model = read(path).expect("a model");
    verify(&model).expect("sound");
    let vlm = Vlm::new(vec![(path.to_owned(), String::new(), model)]);
    let done = rewrite(vlm, &recipe).expect("rewritten");
    let written = serialize(verify(&done.vlm.parts[0].model).expect("sound"));
    let file = File::create(out).expect("a file");
    written.write_to(out, &file).expect("written");
    #[cfg(target_os = "linux")]
    let resident = resident().1 - before;
    #[cfg(not(target_os = "linux"))]
    let resident = 0;
    (MOST.load(Ordering::SeqCst) - allocated, resident)
}

fn ballast(dtype: DataType, width: usize) -> TensorProto {
    TensorProto {
        name: Some("ballast".to_owned()),
        data_type: Some(dtype.into()),
        dims: vec![(BALLAST / width) as i64],
        ..Default::default()
    }
}

fn head(field: u64, length: usize, out: &mut Vec<u8>) {
    encode_varint(field << 3 | 2, out);
    encode_varint(length as u64, out);
}

/// The fixture with weights inside the file, in field `number` of their tensor; the file is a hole there.
fn inline(folder: &Path, number: u64, dtype: DataType, width: usize) -> PathBuf {
    let bytes = std::fs::read(DECODER).expect("a fixture");
    let mut model = ModelProto::decode(bytes.as_slice()).expect("a model");
    let graph = model.graph.take().expect("a graph").encode_to_vec();
    let mut tensor = ballast(dtype, width).encode_to_vec();
    head(number, BALLAST, &mut tensor);
    let mut field = Vec::new();
    head(5, tensor.len() + BALLAST, &mut field);
    field.extend(tensor);
    // The weights end the graph, and other fields of the model come behind it.
    let mut before = Vec::new();
    head(7, graph.len() + field.len() + BALLAST, &mut before);
    before.extend(graph);
    before.extend(field);
    let path = folder.join(format!("inline-{number}.onnx"));
    let mut file = File::create(&path).expect("a file");
    file.write_all(&before).expect("written");
    file.seek(SeekFrom::Current(BALLAST as i64))
        .expect("sought");
    file.write_all(&model.encode_to_vec()).expect("written");
    path
}

/// The fixture with its weights in many tensors inside the file. They are written, not left out as holes: the file
/// cache then has large pages of them, and a kernel may map one whole where a header is looked at.
fn scattered(folder: &Path) -> PathBuf {
    let bytes = std::fs::read(DECODER).expect("a fixture");
    let mut model = ModelProto::decode(bytes.as_slice()).expect("a model");
    let graph = model.graph.as_mut().expect("a graph");
    let each = BALLAST / PIECES;
    graph
        .initializer
        .extend((0..PIECES).map(|number| TensorProto {
            name: Some(format!("ballast{number}")),
            dims: vec![each as i64],
            raw_data: Some(vec![number as u8; each].into()),
            ..ballast(DataType::Uint8, 1)
        }));
    let path = folder.join("scattered.onnx");
    std::fs::write(&path, model.encode_to_vec()).expect("written");
    path
}

/// The fixture with weights in a data file.
fn external(folder: &Path) -> PathBuf {
    let bytes = std::fs::read(DECODER).expect("a fixture");
    let mut model = ModelProto::decode(bytes.as_slice()).expect("a model");
    let entry = |key: &str, value: String| StringStringEntryProto {
        key: Some(key.to_owned()),
        value: Some(value),
    };
    let mut tensor = ballast(DataType::Uint8, 1);
    tensor.data_location = Some(DataLocation::External.into());
    tensor.external_data = vec![
        entry("location", "weights".to_owned()),
        entry("offset", "0".to_owned()),
        entry("length", BALLAST.to_string()),
    ];
    model
        .graph
        .as_mut()
        .expect("a graph")
        .initializer
        .push(tensor);
    let data = File::create(folder.join("weights")).expect("a file");
    data.set_len(BALLAST as u64).expect("a hole");
    let path = folder.join("external.onnx");
    std::fs::write(&path, model.encode_to_vec()).expect("written");
    path
}

#[test]
fn weights_take_no_memory() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("out.onnx");
    let files = [
        scattered(folder.path()),
        inline(folder.path(), 9, DataType::Uint8, 1),
        inline(folder.path(), 4, DataType::Float, 4),
        inline(folder.path(), 10, DataType::Double, 8),
        external(folder.path()),
    ];
    for path in files {
        let (allocated, resident) = rewriting(&path, &out);
        let shown = path.display();
        assert!(allocated < LIMIT, "{shown}: {allocated} bytes allocated");
        assert!(resident < LIMIT, "{shown}: {resident} bytes resident");
        // And they are all there, beside what the pass inserted.
        let model = read(&out).expect("a model");
        let tensors = model.graph().initializers.iter();
        let tensors = tensors.filter_map(|v| model.value(*v).initializer.as_ref());
        let ballast = tensors.filter(|t| t.name.starts_with("ballast"));
        let mut count = 0;
        for tensor in ballast {
            let bytes = tensor.bytes(model.external()).expect("bytes");
            let number = tensor.name["ballast".len()..].parse().unwrap_or(0u8);
            assert!(bytes.iter().all(|b| *b == number), "{shown}");
            count += bytes.len();
        }
        assert_eq!(count, BALLAST, "{shown}");
        let nodes = model.graph().nodes.iter().map(|n| model.node(*n));
        assert!(nodes.filter(|n| n.pass.is_some()).count() > 20, "{shown}");
    }
}
