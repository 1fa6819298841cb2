//! Fields of frames: integers in little-endian order, texts and lists with their length before them. A reader never
//! panics and reserves no memory that the bytes at hand do not justify.

use std::ffi::CStr;

use super::{COMMAND_MAX, FDS_MAX, FRAME_MAX, WireError};

#[derive(Default)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    pub(super) fn frame(self, kind: u16, fds: usize) -> Result<Vec<u8>, WireError> {
        let count = u16::try_from(fds).ok().filter(|_| fds <= FDS_MAX).ok_or(WireError::Descriptors)?;
        let mut frame = Vec::with_capacity(self.0.len() + 4);
        frame.extend(kind.to_le_bytes());
        frame.extend(count.to_le_bytes());
        frame.extend(self.0);
        if frame.len() > FRAME_MAX { Err(WireError::TooLong("frame")) } else { Ok(frame) }
    }

    pub(super) fn command(self) -> Result<Vec<u8>, WireError> {
        if self.0.len() > COMMAND_MAX { Err(WireError::TooLong("command")) } else { Ok(self.0) }
    }

    pub(super) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(super) fn u16(&mut self, value: u16) {
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn i32(&mut self, value: i32) {
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn len(&mut self, len: usize) {
        // Nothing longer than COMMAND_MAX is ever encoded, and that check comes later; a wrapped length cannot pass it.
        self.u32(u32::try_from(len).unwrap_or(u32::MAX));
    }

    pub(super) fn bytes(&mut self, bytes: &[u8], limit: usize, what: &'static str) -> Result<(), WireError> {
        if bytes.len() > limit {
            return Err(WireError::TooLong(what));
        }
        self.len(bytes.len());
        self.0.extend(bytes);
        Ok(())
    }

    /// With its terminating zero, so that the reader can use it in place.
    pub(super) fn text(&mut self, text: &CStr) {
        self.len(text.count_bytes() + 1);
        self.0.extend(text.to_bytes_with_nul());
    }

    pub(super) fn list<T>(
        &mut self,
        items: &[T],
        mut write: impl FnMut(&mut Self, &T) -> Result<(), WireError>,
    ) -> Result<(), WireError> {
        self.len(items.len());
        items.iter().try_for_each(|item| write(self, item))
    }

    pub(super) fn option<T>(
        &mut self,
        value: Option<&T>,
        write: impl FnOnce(&mut Self, &T) -> Result<(), WireError>,
    ) -> Result<(), WireError> {
        self.u8(u8::from(value.is_some()));
        value.map_or(Ok(()), |value| write(self, value))
    }

    /// A record tells its length first, so that fields can be appended to it.
    pub(super) fn record(
        &mut self,
        write: impl FnOnce(&mut Self) -> Result<(), WireError>,
    ) -> Result<(), WireError> {
        let mut inner = Self::default();
        write(&mut inner)?;
        self.bytes(&inner.0, FRAME_MAX, "record")
    }
}

pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn frame(frame: &'a [u8], fds: usize) -> Result<(u16, Self), WireError> {
        let mut r = Self(frame);
        let kind = r.u16()?;
        if usize::from(r.u16()?) == fds { Ok((kind, r)) } else { Err(WireError::Descriptors) }
    }

    /// Whether everything is read: what follows is of a later version than the writer's.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (head, rest) = self.0.split_at_checked(len).ok_or(WireError::Short)?;
        self.0 = rest;
        Ok(head)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self.0.split_first_chunk().ok_or(WireError::Short)?;
        self.0 = rest;
        Ok(*head)
    }

    pub(super) fn u8(&mut self) -> Result<u8, WireError> {
        self.array().map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn i32(&mut self) -> Result<i32, WireError> {
        self.array().map(i32::from_le_bytes)
    }

    pub(super) fn pid(&mut self) -> Result<Option<u32>, WireError> {
        Ok(Some(self.u32()?).filter(|&pid| pid != 0))
    }

    pub(super) fn bytes(&mut self, limit: usize, what: &'static str) -> Result<&'a [u8], WireError> {
        let len = usize::try_from(self.u32()?).map_err(|_| WireError::TooLong(what))?;
        if len > limit { Err(WireError::TooLong(what)) } else { self.take(len) }
    }

    pub(super) fn text(&mut self, limit: usize, what: &'static str) -> Result<String, WireError> {
        let bytes = self.bytes(limit, what)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| WireError::Value(what))
    }

    pub(super) fn c_text(&mut self) -> Result<&'a CStr, WireError> {
        let bytes = self.bytes(COMMAND_MAX, "text")?;
        CStr::from_bytes_with_nul(bytes).map_err(|_| WireError::Value("text"))
    }

    pub(super) fn list<T>(
        &mut self,
        mut read: impl FnMut(&mut Self) -> Result<T, WireError>,
    ) -> Result<Vec<T>, WireError> {
        let len = usize::try_from(self.u32()?).map_err(|_| WireError::TooLong("list"))?;
        // Every item takes at least four bytes, so a made-up length reserves no memory.
        if len > self.0.len() / 4 {
            return Err(WireError::Short);
        }
        let mut items = Vec::with_capacity(len);
        for _ in 0..len {
            items.push(read(self)?);
        }
        Ok(items)
    }

    pub(super) fn option<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, WireError>,
    ) -> Result<Option<T>, WireError> {
        match self.u8()? {
            0 => Ok(None),
            1 => read(self).map(Some),
            _ => Err(WireError::Value("option")),
        }
    }

    pub(super) fn record(&mut self) -> Result<Self, WireError> {
        self.bytes(FRAME_MAX, "record").map(Self)
    }
}
