//! Frames: a little-endian `u32` length, then that many bytes of JSON.
//!
//! [`encode`] and [`decode`] work on byte buffers, so that the agent (blocking) and the daemon (async)
//! share them.

use serde::{Serialize, de::DeserializeOwned};

use crate::MAX_FRAME;

/// Why a frame could not be encoded or decoded. Any of them ends the connection.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The length is over [`MAX_FRAME`].
    #[error("a frame of {0} bytes is over the limit of {MAX_FRAME}")]
    TooLong(usize),
    /// The body is not the JSON that was expected.
    #[error("a frame is not valid: {0}")]
    Json(#[from] serde_json::Error),
}

/// One message as a frame.
///
/// # Errors
/// [`FrameError::TooLong`] when the message's JSON is over [`MAX_FRAME`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = bytes.len() - 4;
    if length > MAX_FRAME {
        return Err(FrameError::TooLong(length));
    }
    bytes[..4].copy_from_slice(&u32::try_from(length).expect("MAX_FRAME fits u32").to_le_bytes());
    Ok(bytes)
}

/// The first whole frame of `buffer` and how many bytes it took, or None when more bytes are needed.
///
/// # Errors
/// [`FrameError::TooLong`] as soon as the length is known, before the body has come.
pub fn decode<T: DeserializeOwned>(buffer: &[u8]) -> Result<Option<(T, usize)>, FrameError> {
    let Some(header) = buffer.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_le_bytes(*header) as usize;
    if length > MAX_FRAME {
        return Err(FrameError::TooLong(length));
    }
    let Some(body) = buffer.get(4..4 + length) else { return Ok(None) };
    Ok(Some((serde_json::from_slice(body)?, 4 + length)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Call, ToAgent};

    #[test]
    fn a_frame_is_found_only_when_whole() {
        let message = ToAgent { id: 7, call: Call::State };
        let bytes = encode(&message).unwrap();
        for cut in 0..bytes.len() {
            assert!(decode::<ToAgent>(&bytes[..cut]).unwrap().is_none());
        }
        let (decoded, used) = decode::<ToAgent>(&[bytes.as_slice(), b"rest"].concat()).unwrap().unwrap();
        assert_eq!((decoded, used), (message, bytes.len()));
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_its_body_comes() {
        let header = u32::try_from(MAX_FRAME + 1).unwrap().to_le_bytes();
        assert!(matches!(decode::<ToAgent>(&header), Err(FrameError::TooLong(_))));
    }
}
