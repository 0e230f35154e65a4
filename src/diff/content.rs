//! Constants by content.
//!
//! Every constant of both models is hashed once (BLAKE3, so that equal digests
//! are equal contents), whatever its name and wherever its bytes lie. Files are
//! read in blocks by several threads and never mapped, so memory stays bounded by
//! blocks × threads however large the weights are. A range of one file that both
//! models refer to is not read at all.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;

use super::DiffError;
use crate::ir::{DataType, ExternalRef, Model, Tensor, TensorData};
use crate::onnx::DataDirectory;

/// Bytes that are read at once; a multiple of every element's size.
pub(super) const BLOCK: usize = 1 << 22;
/// Inline tensors from this size on are read from the file, not through the mapping.
const LARGE: usize = 1 << 20;

/// 256 bits that stand for a constant: element type, dimensions and contents.
pub(super) type Digest = [u8; 32];

/// A file that weights are read from.
#[derive(Debug)]
pub(super) struct DataFile {
    file: File,
    path: PathBuf,
    /// What tells whether two paths are one file.
    id: FileId,
}

#[cfg(unix)]
type FileId = (u64, u64);
#[cfg(not(unix))]
type FileId = PathBuf;

impl DataFile {
    fn open(path: &Path) -> Result<Self, DiffError> {
        let file = File::open(path).map_err(DiffError::io(path))?;
        #[cfg(unix)]
        let id = {
            use std::os::unix::fs::MetadataExt;
            let meta = file.metadata().map_err(DiffError::io(path))?;
            (meta.dev(), meta.ino())
        };
        #[cfg(not(unix))]
        let id = path.canonicalize().map_err(DiffError::io(path))?;
        let path = path.to_owned();
        Ok(Self { file, path, id })
    }

    fn read(&self, start: u64, into: &mut [u8]) -> Result<(), DiffError> {
        #[cfg(unix)]
        let done = std::os::unix::fs::FileExt::read_exact_at(&self.file, into, start);
        #[cfg(not(unix))]
        let done = File::open(&self.path).and_then(|mut file| {
            use std::io::{Read, Seek, SeekFrom};
            file.seek(SeekFrom::Start(start))?;
            file.read_exact(into)
        });
        done.map_err(DiffError::io(&self.path))
    }
}

/// Where the bytes of a constant are.
#[derive(Clone, Debug)]
pub(super) enum Data {
    /// In memory.
    Memory(Bytes),
    /// In a file: first byte and number of bytes.
    File(Arc<DataFile>, u64, u64),
}

impl Data {
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File(_, _, length) => *length,
        }
    }

    /// `length` bytes from `start` on; `buffer` is used where they have to be read.
    pub(super) fn slice<'b>(
        &'b self,
        start: u64,
        length: usize,
        buffer: &'b mut Vec<u8>,
    ) -> Result<&'b [u8], DiffError> {
        match self {
            Self::Memory(bytes) => {
                let from = usize::try_from(start)
                    .unwrap_or(usize::MAX)
                    .min(bytes.len());
                let to = from.saturating_add(length).min(bytes.len());
                Ok(&bytes[from..to])
            }
            Self::File(file, first, _) => {
                buffer.resize(length, 0);
                file.read(first + start, buffer)?;
                Ok(buffer)
            }
        }
    }

    /// The range of a file that it is, if it is one.
    fn range(&self) -> Option<(FileId, u64, u64)> {
        match self {
            Self::Memory(_) => None,
            #[allow(clippy::clone_on_copy, reason = "a path where it is no number")]
            Self::File(file, start, length) => Some((file.id.clone(), *start, *length)),
        }
    }
}

/// A constant of a model.
#[derive(Clone, Debug)]
pub(super) struct Constant {
    pub(super) dtype: DataType,
    pub(super) dims: Vec<i64>,
    pub(super) data: Data,
    /// Strings and sparse tensors: `data` is an unambiguous serialisation of them,
    /// and elements cannot be compared one by one.
    pub(super) packed: bool,
    pub(super) digest: Digest,
    /// In words: `in the graph`, `file model.onnx_data`.
    pub(super) place: String,
}

impl Constant {
    pub(super) fn small(dtype: DataType, dims: Vec<i64>, bytes: Vec<u8>) -> Self {
        Self {
            dtype,
            dims,
            data: Data::Memory(bytes.into()),
            packed: false,
            digest: [0; 32],
            place: INLINE.into(),
        }
    }
}

/// Where a constant is that is in no other file.
pub(super) const INLINE: &str = "the graph";

/// Opens the data that the constants of one model refer to.
pub(super) struct Opener<'m> {
    model: &'m Model,
    path: Option<PathBuf>,
    /// The model file itself, once a large inline tensor is read from it.
    own: Option<Arc<DataFile>>,
    directory: Option<DataDirectory>,
    files: HashMap<Arc<Path>, Arc<DataFile>>,
}

impl<'m> Opener<'m> {
    /// `path`: the model's file, if it was read from one.
    pub(super) fn new(model: &'m Model, path: Option<&Path>) -> Self {
        Self {
            model,
            path: path.map(Path::to_owned),
            own: None,
            directory: model.external().directory().map(DataDirectory::new),
            files: HashMap::new(),
        }
    }

    /// A tensor as a constant, without its digest.
    pub(super) fn constant(&mut self, tensor: &Tensor) -> Result<Constant, DiffError> {
        let (data, packed, place) = match &tensor.data {
            TensorData::Raw(bytes) => (self.inline(bytes)?, false, INLINE.to_owned()),
            TensorData::Strings(list) => {
                let mut bytes = Vec::new();
                for text in list {
                    bytes.extend((text.len() as u64).to_le_bytes());
                    bytes.extend_from_slice(text);
                }
                (Data::Memory(bytes.into()), true, INLINE.to_owned())
            }
            TensorData::External(reference) => {
                let place = format!("file {}", reference.location);
                (self.external(reference)?, false, place)
            }
        };
        Ok(Constant {
            dtype: tensor.dtype,
            dims: tensor.dims.clone(),
            data,
            packed,
            digest: [0; 32],
            place,
        })
    }

    fn inline(&mut self, bytes: &Bytes) -> Result<Data, DiffError> {
        let in_memory = Ok(Data::Memory(bytes.clone()));
        let (Some(path), Some(source)) = (&self.path, &self.model.source) else {
            return in_memory;
        };
        // A slice of the mapped file: its pages would stay in memory if it were
        // read as such.
        let (start, own) = (source.as_ptr() as usize, bytes.as_ptr() as usize);
        let inside = own >= start && own + bytes.len() <= start + source.len();
        if bytes.len() < LARGE || !inside {
            return in_memory;
        }
        let file = match &self.own {
            Some(file) => file.clone(),
            None => {
                let file = Arc::new(DataFile::open(path)?);
                self.own.insert(file).clone()
            }
        };
        Ok(Data::File(file, (own - start) as u64, bytes.len() as u64))
    }

    fn external(&mut self, reference: &ExternalRef) -> Result<Data, DiffError> {
        let place = || self.path.clone().unwrap_or_default();
        let model = |source| {
            DiffError::Model(crate::onnx::OnnxError::Model {
                path: place(),
                source,
            })
        };
        let Some(directory) = &self.directory else {
            return Ok(Data::Memory(
                self.model.external().load(reference).map_err(model)?,
            ));
        };
        let (path, start, length) = directory.range(reference).map_err(model)?;
        let file = match self.files.get(&path) {
            Some(file) => file.clone(),
            None => {
                let file = Arc::new(DataFile::open(&path)?);
                self.files.insert(path, file.clone());
                file
            }
        };
        Ok(Data::File(file, start, length))
    }
}

/// Gives the constants of both sides their digests.
pub(super) fn digest(
    a: &mut [Constant],
    b: &mut [Constant],
    threads: usize,
) -> Result<(), DiffError> {
    // What both sides refer to is told by where it is.
    let key = |c: &Constant| Some((c.data.range()?, c.dtype, c.dims.clone()));
    let of_b: HashSet<_> = b.iter().filter_map(key).collect();
    let shared: HashSet<_> = a
        .iter()
        .filter_map(key)
        .filter(|k| of_b.contains(k))
        .collect();
    let (mut known, mut jobs) = (HashMap::new(), Vec::new());
    let mut all: Vec<&mut Constant> = a.iter_mut().chain(b.iter_mut()).collect();
    for (index, constant) in all.iter().enumerate() {
        if let Some(k) = key(constant).filter(|k| shared.contains(k)) {
            known.entry(k).or_insert_with(Vec::new).push(index);
            continue;
        }
        let blocks = constant.data.len().div_ceil(BLOCK as u64).max(1);
        jobs.extend((0..blocks).map(|block| (index, block)));
    }
    for (number, indices) in known.into_values().enumerate() {
        let mut hasher = blake3::Hasher::new_derive_key("duet diff: a range of a shared file");
        hasher.update(&(number as u64).to_le_bytes());
        let digest: Digest = hasher.finalize().into();
        for index in indices {
            all[index].digest = digest;
        }
    }
    let bytes: u64 = all.iter().map(|c| c.data.len()).sum();
    let views: Vec<&Data> = all.iter().map(|c| &c.data).collect();
    let blocks = in_parallel(
        &jobs,
        if bytes < LARGE as u64 { 1 } else { threads },
        |job, buffer| {
            let (index, block) = *job;
            let data = views[index];
            let start = block * BLOCK as u64;
            let length = (data.len() - start).min(BLOCK as u64) as usize;
            Ok(blake3::hash(data.slice(start, length, &mut buffer.0)?))
        },
    )?;
    let mut hashers: HashMap<usize, blake3::Hasher> = HashMap::new();
    for ((index, _), hash) in jobs.iter().zip(blocks) {
        let hasher = hashers.entry(*index).or_insert_with(|| header(all[*index]));
        hasher.update(hash.as_bytes());
    }
    for (index, hasher) in hashers {
        all[index].digest = hasher.finalize().into();
    }
    Ok(())
}

/// Type, dimensions and length, which the digest covers as well.
fn header(constant: &Constant) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new_derive_key("duet diff: a constant");
    hasher.update(&constant.dtype.code().to_le_bytes());
    hasher.update(&[u8::from(constant.packed)]);
    hasher.update(&(constant.dims.len() as u64).to_le_bytes());
    for dim in &constant.dims {
        hasher.update(&dim.to_le_bytes());
    }
    hasher.update(&constant.data.len().to_le_bytes());
    hasher
}

/// Runs jobs on several threads; results come in the jobs' order. Each thread
/// has two buffers of its own.
pub(super) fn in_parallel<J: Sync, R: Send>(
    jobs: &[J],
    threads: usize,
    run: impl Fn(&J, &mut (Vec<u8>, Vec<u8>)) -> Result<R, DiffError> + Sync,
) -> Result<Vec<R>, DiffError> {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if threads == 0 { cores() } else { threads };
    let threads = threads.min(jobs.len()).max(1);
    if threads == 1 {
        let mut buffers = (Vec::new(), Vec::new());
        return jobs.iter().map(|job| run(job, &mut buffers)).collect();
    }
    let next = AtomicUsize::new(0);
    let work = || {
        let (mut done, mut buffers) = (Vec::new(), (Vec::new(), Vec::new()));
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = jobs.get(at) else {
                return Ok(done);
            };
            match run(job, &mut buffers) {
                Ok(result) => done.push((at, result)),
                Err(error) => {
                    next.store(jobs.len(), Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
    };
    let finished: Vec<Result<Vec<(usize, R)>, DiffError>> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let joined = running.into_iter().map(std::thread::ScopedJoinHandle::join);
        joined
            .map(|r| r.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    let mut all = Vec::with_capacity(jobs.len());
    for part in finished {
        all.extend(part?);
    }
    all.sort_unstable_by_key(|(at, _)| *at);
    Ok(all.into_iter().map(|(_, result)| result).collect())
}
