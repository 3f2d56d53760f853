-- Append a batch of events of one process. Idempotent on (process, seq).
--
-- KEYS  1 log (stream)   2 seqs (hash: process -> last seq, or "lost")
-- ARGV  1 process   2 seq of the first payload   3.. payloads, in order, without gaps
-- Answer  {last seq now in the log, how many were new}
-- Errors  SEQGAP <expected>   the batch starts beyond the next seq; nothing is written
--         FENCED              the process was declared lost; nothing is written
local known = redis.call('HGET', KEYS[2], ARGV[1])
if known == 'lost' then return redis.error_reply('FENCED') end
local last = tonumber(known or '0')
local first = tonumber(ARGV[2])
if first > last + 1 then return redis.error_reply('SEQGAP ' .. (last + 1)) end
local count = #ARGV - 2
local seen = last + 1 - first
if seen >= count then
  -- A write, though it changes nothing: WAIT and WAITAOF speak of the last write of the connection.
  if known then redis.call('HSET', KEYS[2], ARGV[1], known) end
  return {last, 0}
end
for i = seen + 3, count + 2 do
  redis.call('XADD', KEYS[1], '*', 'e', ARGV[i])
end
last = first + count - 1
redis.call('HSET', KEYS[2], ARGV[1], last)
return {last, count - seen}
